//! The spans of a step as ranges in the timelines of NVIDIA's profilers.

use std::ffi::CString;

use minisgl_cuda::Nvtx;
use tracing::Subscriber;
use tracing::span::Id;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

/// What a profiler sets so that the programs that it starts find it.
const PROFILER: &str = "NVTX_INJECTION64_PATH";

/// Where ranges go.
trait Ranges: Send + Sync + 'static {
    fn push(&self, name: &str);
    fn pop(&self);
}

impl Ranges for Nvtx {
    fn push(&self, name: &str) {
        // No span's name has a zero in it; if one had, its end would need a beginning all the same.
        Nvtx::push(self, &CString::new(name).unwrap_or_default());
    }

    fn pop(&self) {
        Nvtx::pop(self);
    }
}

/// Has a range begin and end with every span of this program that a thread enters and leaves.
pub struct NvtxRanges(Box<dyn Ranges>);

impl NvtxRanges {
    /// Where a profiler has started the program and the NVTX library is there; else nothing, and
    /// spans cost a comparison.
    pub fn for_profiler<S>() -> Option<impl Layer<S>>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        std::env::var_os(PROFILER)?;
        Some(Self(Box::new(Nvtx::open()?)).of_this_program())
    }

    fn of_this_program<S>(self) -> impl Layer<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        self.with_filter(filter_fn(|at| at.is_span() && at.target().starts_with("minisgl")))
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for NvtxRanges {
    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        self.0.push(context.metadata(id).map_or("", tracing::Metadata::name));
    }

    fn on_exit(&self, _: &Id, _: Context<'_, S>) {
        self.0.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::layer::SubscriberExt;

    struct Noted(Arc<Mutex<Vec<String>>>);

    impl Ranges for Noted {
        fn push(&self, name: &str) {
            self.0.lock().unwrap().push(name.to_owned());
        }

        fn pop(&self) {
            self.0.lock().unwrap().push("end".to_owned());
        }
    }

    #[test]
    fn ranges_begin_and_end_with_this_programs_spans() {
        let noted = Arc::default();
        let ranges = NvtxRanges(Box::new(Noted(Arc::clone(&noted)))).of_this_program();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(ranges), || {
            tracing::debug_span!("plan").in_scope(|| {
                tracing::debug_span!(target: "hyper", "another crate's").in_scope(|| ());
                tracing::debug_span!("inner").in_scope(|| tracing::debug!("no span"));
            });
            tracing::debug_span!("launch").in_scope(|| ());
        });
        assert_eq!(*noted.lock().unwrap(), ["plan", "inner", "end", "end", "launch", "end"]);
    }
}
