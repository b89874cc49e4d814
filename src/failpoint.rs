//! Named points at which the kill tests end the process. Nothing without the feature `failpoints`.

/// Ends the process here when `FAILPOINTS` says `name=return`.
#[macro_export]
macro_rules! failpoint {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        fail::fail_point!($name, |_| std::process::abort());
    };
}
