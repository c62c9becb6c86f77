//! Errors at every operation while a bundle is written.

use std::sync::Arc;

use dualrestore::bundle::{Bundle, BundleWriter};
use dualrestore::device::{Fault, FaultPlan, FaultyFolder, Folder, Operation, RamFolder, Strikes};
use dualrestore::error::{ErrorKind, Result};
use dualrestore::extent::ByteRange;

use crate::workshop::{Made, Recipe, Verdict, go_on, judge, options_of, source_of};

fn write(recipe: &Recipe, folder: &dyn Folder) -> Result<()> {
    BundleWriter::create_in(folder, &source_of(recipe), &options_of(recipe), &mut go_on).map(|_| ())
}

#[test]
fn a_full_or_failing_medium_at_any_operation_ends_the_bundle_with_its_reason() {
    for (operation, errno) in [(Operation::Write, 28), (Operation::Write, 5), (Operation::Flush, 5)]
    {
        let recipe = if errno == 28 { Recipe::large(1, 5) } else { Recipe::small() };
        let mut at = 0;
        loop {
            let (plan, ram) = (FaultPlan::new(), RamFolder::new());
            let fault = Fault::once(operation, errno).striking(Strikes::After(at));
            plan.add(Fault { done_before: 4096, ..fault });
            let folder = FaultyFolder::new(Arc::new(ram.clone()), plan.clone());
            let written = write(&recipe, &folder);
            let what = format!("{operation:?} {at} fails with {errno}");
            if plan.struck() == 0 {
                written.expect("nothing failed");
                break;
            }
            let failed = written.is_err();
            match written {
                Err(error) => assert_eq!(error.errno(), Some(errno), "{what}: {error}"),
                // What a full medium had no room for is left for a further one, here none; or it
                // had room after all.
                Ok(()) => assert_eq!(errno, 28, "{what}"),
            }
            let mut made = Made { folder: ram.clone(), ..recipe.make() };
            let opened =
                Bundle::open_in(Arc::new(ram)).ok().map(|bundle| bundle.manifest().clone());
            if let Some(medium) = opened.as_ref().filter(|it| it.medium.is_some_and(|it| !it.last))
            {
                // It says that others follow it: it answers for what it covers, and for no more.
                assert_eq!((errno, failed), (28, true), "{what}");
                let runs = medium.segments.iter().flat_map(|segment| &segment.coverage);
                made.selection = runs.map(|run| ByteRange::from(*run)).collect();
            }
            match judge(&made, &what) {
                Verdict::Refused(kind) => assert_eq!(kind, ErrorKind::Format, "{what}"),
                // Only the flush of the names came after the manifest had its name.
                verdict => assert!(verdict.is_whole(&made), "{what}: {verdict:?}"),
            }
            at += 1;
        }
        assert!(at >= 5, "several operations were tried");
    }
}
