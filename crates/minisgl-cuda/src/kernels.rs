//! Compiles kernels with NVRTC for the card at hand and keeps the cubins on disk.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use cudarc::driver::result;
use cudarc::nvrtc::{result as nvrtc, sys};
use minisgl_tensor::Result;

use crate::device::{Device, Function, driver, fail};

const COMMON: &str =
    concat!(include_str!("../kernels/common.cuh"), include_str!("../kernels/ptx.cuh"));

/// A kernel file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names of the files")]
pub enum Module {
    Elementwise,
    Gemv,
    Stream,
    Wide,
    Narrow,
    Strip,
    StripShort,
    StripTall,
    Head,
    Attention,
    Decode,
    Attend,
    Mlp,
    Prefill,
    Sample,
    Moe,
    Collective,
}

impl Module {
    /// Whether its blocks are to be on a multiprocessor with those of the kernel in front or behind: of two that want
    /// different parts of its memory as shared memory, one waits until the other is gone.
    fn has_neighbours(self) -> bool {
        matches!(self, Self::StripShort | Self::Narrow)
    }

    fn source(self) -> &'static str {
        match self {
            Module::Elementwise => include_str!("../kernels/elementwise.cu"),
            Module::Gemv => include_str!("../kernels/gemv.cu"),
            Module::Stream => {
                concat!(include_str!("../kernels/hopper.cuh"), include_str!("../kernels/stream.cu"))
            }
            Module::Wide => {
                concat!(include_str!("../kernels/hopper.cuh"), include_str!("../kernels/wide.cu"))
            }
            Module::Narrow => {
                concat!(
                    include_str!("../kernels/hopper.cuh"),
                    include_str!("../kernels/ring.cuh"),
                    include_str!("../kernels/narrow.cu")
                )
            }
            Module::Strip => {
                concat!(
                    include_str!("../kernels/hopper.cuh"),
                    include_str!("../kernels/ring.cuh"),
                    include_str!("../kernels/strip.cuh"),
                    include_str!("../kernels/strip.cu")
                )
            }
            Module::StripShort => {
                concat!(
                    include_str!("../kernels/hopper.cuh"),
                    include_str!("../kernels/ring.cuh"),
                    include_str!("../kernels/strip.cuh"),
                    include_str!("../kernels/strip_short.cu")
                )
            }
            Module::StripTall => {
                concat!(
                    include_str!("../kernels/hopper.cuh"),
                    include_str!("../kernels/ring.cuh"),
                    include_str!("../kernels/strip.cuh"),
                    include_str!("../kernels/strip_tall.cu")
                )
            }
            Module::Head => {
                concat!(
                    include_str!("../kernels/hopper.cuh"),
                    include_str!("../kernels/ring.cuh"),
                    include_str!("../kernels/head.cu")
                )
            }
            Module::Attention => include_str!("../kernels/attention.cu"),
            Module::Decode => {
                concat!(
                    include_str!("../kernels/hopper.cuh"),
                    include_str!("../kernels/attention_tile.cuh"),
                    include_str!("../kernels/decode_work.cuh"),
                    include_str!("../kernels/decode.cu")
                )
            }
            Module::Attend => {
                concat!(
                    include_str!("../kernels/hopper.cuh"),
                    include_str!("../kernels/attention_tile.cuh"),
                    include_str!("../kernels/half_layer.cuh"),
                    include_str!("../kernels/attend.cu")
                )
            }
            Module::Mlp => {
                concat!(
                    include_str!("../kernels/hopper.cuh"),
                    include_str!("../kernels/half_layer.cuh"),
                    include_str!("../kernels/mlp.cu")
                )
            }
            Module::Prefill => {
                concat!(
                    include_str!("../kernels/hopper.cuh"),
                    include_str!("../kernels/prefill.cu")
                )
            }
            Module::Sample => include_str!("../kernels/sample.cu"),
            Module::Moe => include_str!("../kernels/moe.cu"),
            Module::Collective => include_str!("../kernels/collective.cu"),
        }
    }
}

/// A module and what it is specialised by: `("DIM", 128)`.
pub(crate) type Key = (Module, Vec<(&'static str, i32)>);

/// The kernels of one card, compiled when first asked for.
pub(crate) struct Kernels {
    device: Arc<Device>,
    exact: bool,
    race_checked: bool,
    functions: Mutex<HashMap<(Key, &'static str), Function>>,
}

impl Kernels {
    pub(crate) fn new(device: &Arc<Device>, exact: bool, race_checked: bool) -> Result<Self> {
        check_nvrtc()?;
        let device = Arc::clone(device);
        Ok(Self { device, exact, race_checked, functions: Mutex::default() })
    }

    /// The kernel `name` of `module`, specialised by `defines`.
    pub(crate) fn get(
        &self,
        module: Module,
        defines: &[(&'static str, i32)],
        name: &'static str,
    ) -> Result<Function> {
        let mut functions =
            self.functions.lock().map_err(|_| fail("the kernel table is poisoned"))?;
        let key = ((module, defines.to_vec()), name);
        if let Some(function) = functions.get(&key) {
            return Ok(*function);
        }
        let cubin = self.cubin(module, defines)?;
        self.device.bind()?;
        // SAFETY: a cubin that NVRTC made for this card; the driver checks its header.
        let loaded = unsafe { result::module::load_data(cubin.as_ptr().cast()) }
            .map_err(|e| driver(&format!("loading {module:?} {defines:?}"), e))?;
        let symbol = CString::new(name).map_err(|_| fail("a kernel's name holds a zero"))?;
        // SAFETY: the module was just loaded and is never unloaded.
        let function = unsafe { result::module::get_function(loaded, symbol) }
            .map_err(|e| driver(&format!("finding {name} in {module:?}"), e))?;
        self.device.allow_shared(Function(function), module.has_neighbours())?;
        functions.insert(key, Function(function));
        Ok(Function(function))
    }

    /// Compiles `modules` on threads of their own, so that later calls of `get` find cubins.
    pub(crate) fn prepare(&self, modules: &[Key]) -> Result<()> {
        std::thread::scope(|scope| {
            let jobs: Vec<_> = modules
                .iter()
                .map(|(module, defines)| {
                    scope.spawn(move || self.cubin(*module, defines).map(drop))
                })
                .collect();
            jobs.into_iter().try_for_each(|job| {
                job.join().unwrap_or_else(|_| Err(fail("a compiler thread panicked")))
            })
        })
    }

    fn cubin(&self, module: Module, defines: &[(&'static str, i32)]) -> Result<Vec<u8>> {
        let (major, minor) = self.device.capability;
        let suffix = if major >= 9 { "a" } else { "" };
        let arch = format!("sm_{major}{minor}{suffix}");
        let mut defines = defines.to_vec();
        defines.extend(self.race_checked.then_some(("RACE_CHECKED", 1)));
        let path = cache_file(module, &defines, &arch, self.exact);
        if let Some(bytes) = path.as_ref().and_then(|p| std::fs::read(p).ok()) {
            return Ok(bytes);
        }
        let (bytes, _) = compile(module, &defines, &arch, self.exact)?;
        if let Some(path) = path {
            // The cache is a convenience: a folder that cannot be written costs a compilation.
            let temporary = path.with_extension(format!("{}", std::process::id()));
            let written = path
                .parent()
                .map_or(Ok(()), std::fs::create_dir_all)
                .and_then(|()| std::fs::write(&temporary, &bytes))
                .and_then(|()| std::fs::rename(&temporary, &path));
            if let Err(error) = written {
                tracing::warn!(path = %path.display(), %error, "a compiled kernel could not be kept");
            }
        }
        Ok(bytes)
    }
}

/// Compiles one kernel file for `arch` (`sm_90a`): the cubin and the compiler's report, which has
/// each kernel's registers and spills. Needs NVRTC, not a card.
///
/// # Errors
/// If NVRTC is not there or refuses the source; the message holds its log.
pub fn compile(
    module: Module,
    defines: &[(&'static str, i32)],
    arch: &str,
    exact: bool,
) -> Result<(Vec<u8>, String)> {
    check_nvrtc()?;
    let source = CString::new(format!("{COMMON}\n{}", module.source()))
        .map_err(|_| fail("a kernel holds a zero"))?;
    let program = nvrtc::create_program(&source, None)
        .map_err(|e| fail(format!("nvrtcCreateProgram: {e}")))?;
    let options = options(defines, arch, exact);
    // SAFETY: `program` is alive until `destroy_program` below.
    let outcome = unsafe { nvrtc::compile_program(program, &options) };
    // SAFETY: as above; the log ends with a zero.
    let log = unsafe { nvrtc::get_program_log(program) }
        .map(|log| unsafe { CStr::from_ptr(log.as_ptr()) }.to_string_lossy().into_owned())
        .unwrap_or_default();
    let cubin = outcome.and_then(|()| {
        let mut size = 0;
        // SAFETY: the buffer has the size that NVRTC asks for.
        unsafe {
            sys::nvrtcGetCUBINSize(program, &raw mut size).result()?;
            let mut bytes = vec![0u8; size];
            sys::nvrtcGetCUBIN(program, bytes.as_mut_ptr().cast()).result()?;
            Ok(bytes)
        }
    });
    // SAFETY: made above, used no more.
    let _ = unsafe { nvrtc::destroy_program(program) };
    match cubin {
        Ok(bytes) => Ok((bytes, log)),
        Err(error) => {
            Err(fail(format!("compiling {module:?} {defines:?} for {arch}: {error}\n{log}")))
        }
    }
}

fn options(defines: &[(&'static str, i32)], arch: &str, exact: bool) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={arch}"),
        "--std=c++17".to_owned(),
        "--ptxas-options=-v".to_owned(),
        format!("-DEXACT={}", i32::from(exact)),
    ];
    options.extend(defines.iter().map(|(name, value)| format!("-D{name}={value}")));
    options
}

/// Where a cubin is kept: named by a hash of all that it depends on.
fn cache_file(
    module: Module,
    defines: &[(&'static str, i32)],
    arch: &str,
    exact: bool,
) -> Option<PathBuf> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both point to integers of this frame.
    unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result().ok()?;
    let name =
        format!("{:?}", (COMMON, module.source(), options(defines, arch, exact), major, minor));
    Some(cache_dir()?.join(format!("{module:?}-{arch}-{:016x}.cubin", fnv(name.as_bytes()))))
}

/// `$XDG_CACHE_HOME/minisgl/kernels`, or `~/.cache/…`.
pub(crate) fn cache_dir() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(base.join("minisgl").join("kernels"))
}

/// FNV-1a, 64 bits.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn check_nvrtc() -> Result<()> {
    // SAFETY: only opens the library.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    Err(fail(
        "NVRTC, the kernel compiler, was not found: libnvrtc.so.13 or .12 is not on the loader's path; \
         install it (`pip install nvidia-cuda-nvrtc`) and add its folder to LD_LIBRARY_PATH",
    ))
}
