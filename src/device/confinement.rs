//! Takes from this process what it does not need: writing elsewhere (Landlock), and system calls
//! that only an intruder would make (seccomp).
//!
//! | call | holds for | ends |
//! |---|---|---|
//! | `confine_writing` | the thread that calls it, and all that it starts | never |
//! | `renounce_system_calls` | all threads of the process | never |
//!
//! Guarantees: what is open stays usable; reading is not touched, for media may be anywhere.
//! Does not know: which places a daemon needs.
//!
//! The filter names what is refused, with `EPERM`, and lets the rest through: what is allowed
//! belongs to whoever keeps up with C libraries and interpreters, which is the unit's
//! `SystemCallFilter=@system-service`.

use std::collections::BTreeMap;
use std::path::Path;

use landlock::{
    ABI, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, path_beneath_rules,
};
use rustix::io::Errno;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter_all_threads};

use crate::error::{Error, ErrorKind, Result};

/// What a daemon that serves volumes never does, by what it would be done for.
const RENOUNCED: &[libc::c_long] = &[
    // To run another program.
    libc::SYS_execve,
    libc::SYS_execveat,
    // To look into other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_perf_event_open,
    // To see another file system, or to leave a directory tree.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_fsconfig,
    libc::SYS_mount_setattr,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_open_by_handle_at,
    libc::SYS_mknodat,
    // To change the kernel, the clock or the machine.
    libc::SYS_bpf,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_vhangup,
    // What kernels were broken through.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_userfaultfd,
    libc::SYS_personality,
    libc::SYS_remap_file_pages,
];

#[cfg(target_arch = "x86_64")]
const HERE: TargetArch = TargetArch::x86_64;
#[cfg(target_arch = "aarch64")]
const HERE: TargetArch = TargetArch::aarch64;

#[cfg(target_arch = "x86_64")]
const RENOUNCED_HERE: &[libc::c_long] =
    &[libc::SYS_mknod, libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt, libc::SYS_uselib];
#[cfg(not(target_arch = "x86_64"))]
const RENOUNCED_HERE: &[libc::c_long] = &[];

/// From now on this thread, and every thread that it starts, makes, changes and removes files below
/// these places only (files name themselves). Places that do not exist are left out.
///
/// `ENOSYS` where the kernel has no Landlock: then nothing is confined.
pub fn confine_writing(places: &[impl AsRef<Path>]) -> Result<()> {
    // Of the newest the kernel knows as much as it can; without the first it knows nothing.
    let writing = AccessFs::from_write(ABI::V3);
    let confined = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(writing)
        .and_then(Ruleset::create)
        .and_then(|rules| rules.add_rules(path_beneath_rules(places, writing)))
        .and_then(|rules| rules.restrict_self());
    let status = confined.map_err(|error| {
        Error::new(ErrorKind::Device, format!("cannot confine writing by Landlock: {error}"))
    })?;
    if status.ruleset == RulesetStatus::NotEnforced {
        return Err(Error::new(
            ErrorKind::Device,
            "expected a kernel with Landlock (from Linux 5.13 on, named in its lsm=), found none",
        )
        .with_errno(Errno::NOSYS.raw_os_error()));
    }
    Ok(())
}

/// From now on no thread of this process runs another program, mounts, traces, loads into the
/// kernel or sets its clock; nor does it gain privileges (`no_new_privs`).
pub fn renounce_system_calls() -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Device, format!("cannot renounce system calls by seccomp: {error}"))
    };
    let refuse = SeccompAction::Errno(Errno::PERM.raw_os_error().unsigned_abs());
    let numbers = RENOUNCED.iter().chain(RENOUNCED_HERE);
    let rules: BTreeMap<i64, Vec<_>> = numbers.map(|&number| (number, Vec::new())).collect();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, HERE)
        .map_err(|error| failed(&error))?;
    let program = BpfProgram::try_from(filter).map_err(|error| failed(&error))?;
    rustix::thread::set_no_new_privs(true)
        .map_err(|errno| Error::device("forbid new privileges", &errno.into()))?;
    apply_filter_all_threads(&program).map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::disallowed_methods, reason = "files are tried, a thread is confined")]

    use super::*;
    use std::fs;
    use std::io::ErrorKind::PermissionDenied;

    /// The result of what is tried in a thread that may write at these places.
    fn confined<R: Send + 'static>(
        places: &[&Path],
        work: impl FnOnce() -> R + Send + 'static,
    ) -> R {
        let places: Vec<_> = places.iter().map(|place| place.to_path_buf()).collect();
        let thread = std::thread::spawn(move || {
            confine_writing(&places).expect("the kernel has Landlock");
            // What holds for a thread holds for those that it starts.
            std::thread::spawn(work).join().expect("no panic")
        });
        thread.join().expect("no panic")
    }

    #[test]
    fn a_confined_thread_writes_at_its_places_only_and_reads_everywhere() {
        let (inside, outside) =
            (tempfile::tempdir().expect("made"), tempfile::tempdir().expect("made"));
        let (here, there) = (inside.path().to_owned(), outside.path().to_owned());
        fs::write(there.join("old"), "old").expect("not yet confined");
        let nowhere = here.join("nowhere");
        confined(&[&here.clone(), &nowhere], move || {
            fs::write(here.join("new"), "new").expect("its place");
            fs::create_dir(here.join("sub")).expect("its place");
            fs::rename(here.join("new"), here.join("sub/new")).expect("between its places");
            fs::remove_file(here.join("sub/new")).expect("its place");
            assert_eq!(fs::read(there.join("old")).expect("reading is free"), b"old");
            let denied = [
                fs::write(there.join("new"), "new").expect_err("elsewhere").kind(),
                fs::write(there.join("old"), "new").expect_err("elsewhere").kind(),
                fs::remove_file(there.join("old")).expect_err("elsewhere").kind(),
                fs::create_dir(there.join("sub")).expect_err("elsewhere").kind(),
            ];
            assert_eq!(denied, [PermissionDenied; 4]);
        });
        assert_eq!(fs::read(outside.path().join("old")).expect("there"), b"old");
        fs::write(outside.path().join("new"), "new").expect("other threads are free");
    }

    #[test]
    fn a_single_file_can_be_a_place_and_what_is_open_stays_writable() {
        use std::io::Write as _;
        let home = tempfile::tempdir().expect("made");
        let (one, other) = (home.path().join("one"), home.path().join("other"));
        fs::write(&one, "").expect("not yet confined");
        let mut open = fs::File::create(&other).expect("not yet confined");
        confined(&[&one.clone()], move || {
            fs::write(&one, "written").expect("named");
            open.write_all(b"written").expect("was open before");
            assert!(fs::write(&other, "").is_err());
            assert!(fs::remove_file(&one).is_err(), "a file is not its directory");
        });
        assert_eq!(fs::read(home.path().join("other")).expect("there"), b"written");
    }
}
