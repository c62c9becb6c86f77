"""The bulk channel beside its peers and beside what the disks allow."""
