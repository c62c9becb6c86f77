"""The names that others rely on."""

import dualrestore


def test_the_public_names_are_these_and_no_others() -> None:
    assert dualrestore.__all__ == [
        "Bundle",
        "BundleChunk",
        "BundleExtent",
        "BundleReport",
        "BundleVerification",
        "BusyError",
        "ByteBuffer",
        "ConfigurationError",
        "DeadlineError",
        "DeviceError",
        "DualRestoreError",
        "Extent",
        "ExtractReport",
        "FormatError",
        "IdentityError",
        "IntegrityError",
        "InterruptedJobError",
        "LinkError",
        "LockedError",
        "MergeReport",
        "NextMediumError",
        "OverwriteMap",
        "PoisonedError",
        "SignatureError",
        "UsageError",
        "__version__",
        "merge",
        "open_export",
    ]


def test_each_lazy_name_is_a_public_one() -> None:
    assert {*dualrestore._HOMES, "__version__"} == set(dualrestore.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(dualrestore, "nonsense")


def test_the_version_is_the_core_crates() -> None:
    import tomllib
    from pathlib import Path

    manifest = Path(__file__).parents[2] / "Cargo.toml"
    assert tomllib.loads(manifest.read_text())["package"]["version"] == dualrestore.__version__
