//! Named ranges in the timelines of NVIDIA's profilers.

use std::ffi::{CStr, c_char, c_int};

use libloading::Library;

/// The NVTX library. Its calls do nothing unless a profiler has started the program.
pub struct Nvtx {
    push: unsafe extern "C" fn(*const c_char) -> c_int,
    pop: unsafe extern "C" fn() -> c_int,
}

impl Nvtx {
    /// Opens the library, under the name that toolkits up to 12 give it or under that of later ones;
    /// `None` where there is none.
    pub fn open() -> Option<Self> {
        const NAMES: [&str; 3] =
            ["libnvtx3interop.so.1", "libnvtx3interop.so", "libnvToolsExt.so.1"];
        // SAFETY: the library's initialisers do nothing but set it up.
        let library = NAMES.into_iter().find_map(|name| unsafe { Library::new(name) }.ok())?;
        // SAFETY: the types are those of nvToolsExt.h; the library is never closed.
        let functions = unsafe {
            Self {
                push: *library.get(b"nvtxRangePushA\0").ok()?,
                pop: *library.get(b"nvtxRangePop\0").ok()?,
            }
        };
        std::mem::forget(library);
        Some(functions)
    }

    /// Begins a range inside those that this thread is in.
    pub fn push(&self, name: &CStr) {
        // SAFETY: the name ends with a zero and is copied.
        unsafe { (self.push)(name.as_ptr()) };
    }

    /// Ends the range that this thread began last.
    pub fn pop(&self) {
        // SAFETY: takes nothing; without a range it says so and does nothing.
        unsafe { (self.pop)() };
    }
}
