//! A card: its context, the one stream that everything runs on, memory and launches.

use std::ffi::c_void;
use std::sync::{Arc, OnceLock};

use cudarc::driver::{DriverError, result, sys};
use minisgl_tensor::{BackendError, Memory, MemoryInfo, Result, Tensor};

use crate::group::Group;

/// The context and the stream of one card.
pub(crate) struct Device {
    pub(crate) context: sys::CUcontext,
    pub(crate) handle: sys::CUdevice,
    pub(crate) stream: sys::CUstream,
    pub(crate) name: String,
    /// Compute capability: `(9, 0)`.
    pub(crate) capability: (i32, i32),
    pub(crate) multiprocessors: usize,
    /// Its memory is the host's, which can give more than is free: what files are cached in, above all.
    pub(crate) integrated: bool,
    /// The most shared memory that a block may have.
    pub(crate) shared_max: i32,
    /// The group of ranks that this card belongs to: then waiting for it has a time limit.
    pub(crate) group: OnceLock<Arc<Group>>,
}

// SAFETY: driver handles may be used from any thread; every use first makes the context current.
unsafe impl Send for Device {}
// SAFETY: as above; the driver locks what it shares.
unsafe impl Sync for Device {}

/// The names of this machine's cards; empty where there is no driver.
pub fn devices() -> Vec<String> {
    // SAFETY: only opens the library.
    if !unsafe { sys::is_culib_present() } || result::init().is_err() {
        return Vec::new();
    }
    let count = result::device::get_count().unwrap_or(0);
    (0..count).filter_map(|i| result::device::get_name(result::device::get(i).ok()?).ok()).collect()
}

impl Device {
    pub(crate) fn open(index: usize) -> Result<Self> {
        // SAFETY: only opens the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(fail(
                "no NVIDIA driver: libcuda.so.1 is not on the loader's path; install the driver \
                 (580 or newer), or add its folder to LD_LIBRARY_PATH",
            ));
        }
        result::init().map_err(|e| driver("cuInit", e))?;
        let count = result::device::get_count().map_err(|e| driver("cuDeviceGetCount", e))?;
        if index >= count as usize {
            return Err(fail(format!(
                "cuda:{index} was asked for, the driver shows {count} cards"
            )));
        }
        let handle = result::device::get(index as i32).map_err(|e| driver("cuDeviceGet", e))?;
        // SAFETY: `handle` is a device that the driver just gave.
        let context = unsafe { result::primary_ctx::retain(handle) }
            .map_err(|e| driver("cuDevicePrimaryCtxRetain", e))?;
        // SAFETY: the context was just retained.
        unsafe { result::ctx::set_current(context) }.map_err(|e| driver("cuCtxSetCurrent", e))?;
        let attribute = |which| {
            // SAFETY: `handle` is valid.
            unsafe { result::device::get_attribute(handle, which) }
                .map_err(|e| driver("cuDeviceGetAttribute", e))
        };
        use sys::CUdevice_attribute as A;
        let capability = (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability.0 < 8 {
            return Err(BackendError::Unsupported(
                format!(
                    "compute capability 8.0 or newer is needed, cuda:{index} has {}.{}",
                    capability.0, capability.1
                )
                .into(),
            ));
        }
        Ok(Self {
            context,
            handle,
            stream: result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(|e| driver("cuStreamCreate", e))?,
            name: result::device::get_name(handle).map_err(|e| driver("cuDeviceGetName", e))?,
            capability,
            multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            integrated: attribute(A::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0,
            shared_max: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            group: OnceLock::new(),
        })
    }

    /// Makes this card's context the calling thread's.
    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| driver("cuCtxSetCurrent", e))
    }

    pub(crate) fn memory(&self) -> Result<MemoryInfo> {
        self.bind()?;
        let (free, total) = result::mem_get_info().map_err(|e| driver("cuMemGetInfo", e))?;
        Ok(MemoryInfo { total, free })
    }

    /// Zeroed memory, ready before anything that is enqueued later.
    pub(crate) fn alloc(self: &Arc<Self>, bytes: usize) -> Result<Arc<DeviceMemory>> {
        self.bind()?;
        // SAFETY: the memory is owned by the value made from it.
        let address = unsafe { result::malloc_sync(bytes.max(16)) }.map_err(|e| {
            if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                BackendError::OutOfMemory { bytes, free: self.memory().map_or(0, |m| m.free) }
            } else {
                driver("cuMemAlloc", e)
            }
        })?;
        let memory = DeviceMemory { device: Arc::clone(self), address, bytes: bytes.max(16) };
        if !self.is_capturing()? {
            // SAFETY: the range was just allocated.
            unsafe { result::memset_d8_async(address, 0, memory.bytes, self.stream) }
                .map_err(|e| driver("cuMemsetD8Async", e))?;
        } else {
            // SAFETY: as above; the legacy stream is not being captured.
            unsafe { result::memset_d8_sync(address, 0, memory.bytes) }
                .map_err(|e| driver("cuMemsetD8", e))?;
        }
        Ok(Arc::new(memory))
    }

    pub(crate) fn is_capturing(&self) -> Result<bool> {
        // SAFETY: the stream lives as long as `self`.
        let status = unsafe { result::stream::is_capturing(self.stream) }
            .map_err(|e| driver("cuStreamIsCapturing", e))?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    pub(crate) fn synchronize(&self) -> Result<()> {
        self.bind()?;
        let Some(group) = self.group.get() else {
            // SAFETY: the stream lives as long as `self`.
            return unsafe { result::stream::synchronize(self.stream) }
                .map_err(|e| driver("cuStreamSynchronize", e));
        };
        // SAFETY: as above.
        group.wait(|| ready("cuStreamQuery", unsafe { sys::cuStreamQuery(self.stream) }))
    }

    /// Waits until nothing runs, whatever became of the group or of the work.
    pub(crate) fn drain(&self) {
        if self.bind().is_ok() {
            // SAFETY: the stream lives as long as `self`.
            let _ = unsafe { result::stream::synchronize(self.stream) };
        }
    }

    /// Waits for what was enqueued before `event`. In a group, not longer than ranks wait for each
    /// other; and what a group that has ended was computing is an error.
    ///
    /// # Safety
    /// The event lives.
    pub(crate) unsafe fn wait(&self, event: sys::CUevent) -> Result<()> {
        self.bind()?;
        let Some(group) = self.group.get() else {
            // SAFETY: as the caller promises.
            return unsafe { result::event::synchronize(event) }
                .map_err(|e| driver("cuEventSynchronize", e));
        };
        // SAFETY: as the caller promises.
        group.wait(|| ready("cuEventQuery", unsafe { sys::cuEventQuery(event) }))
    }

    /// Lets a kernel be launched with all the shared memory that a block can have; and, with `for_all`, with as much of
    /// a multiprocessor's memory as shared memory as there can be, for other kernels' blocks.
    pub(crate) fn allow_shared(&self, function: Function, for_all: bool) -> Result<()> {
        use sys::CUfunction_attribute as A;
        // SAFETY: `function` belongs to a module that is never unloaded.
        let set = |attribute, value| unsafe {
            result::function::set_function_attribute(function.0, attribute, value)
                .map_err(|e| driver("cuFuncSetAttribute", e))
        };
        // SAFETY: as above.
        let fixed = unsafe {
            result::function::get_function_attribute(
                function.0,
                A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
            )
        }
        .map_err(|e| driver("cuFuncGetAttribute", e))?;
        set(A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self.shared_max - fixed)?;
        if for_all {
            set(A::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)?;
        }
        Ok(())
    }

    /// Enqueues a kernel. It may start while the one before drains: kernels wait for their
    /// predecessor themselves (see `kernels/common.cuh`).
    ///
    /// # Safety
    /// `args` are what `function` takes, and its accesses stay inside the memory they name.
    pub(crate) unsafe fn launch(
        &self,
        function: Function,
        shape: Launch,
        args: &[Arg],
    ) -> Result<()> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        let mut words: Vec<*mut c_void> =
            args.iter().map(|arg| (&raw const arg.0).cast_mut().cast()).collect();
        // SAFETY: as the caller promises.
        unsafe { self.launch_raw(function, shape, &mut words) }
    }

    /// As `launch`, for a kernel that takes one struct.
    ///
    /// # Safety
    /// As `launch`; `S` has the layout of the kernel's struct.
    pub(crate) unsafe fn launch_struct<S>(
        &self,
        function: Function,
        shape: Launch,
        args: &S,
    ) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe {
            self.launch_raw(function, shape, &mut [std::ptr::from_ref(args).cast_mut().cast()])
        }
    }

    /// As `launch`, with the arguments' addresses.
    ///
    /// # Safety
    /// As `launch`.
    pub(crate) unsafe fn launch_raw(
        &self,
        function: Function,
        shape: Launch,
        words: &mut [*mut c_void],
    ) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.launch_when(Start::Early, function, shape, words) }
    }

    /// As `launch_raw`, for a kernel that starts when `start` says.
    ///
    /// # Safety
    /// As `launch`.
    pub(crate) unsafe fn launch_when(
        &self,
        start: Start,
        function: Function,
        shape: Launch,
        words: &mut [*mut c_void],
    ) -> Result<()> {
        self.bind()?;
        // Both are new with 9.0.
        let mut all = [starts_early(), clusters_of(shape.cluster)];
        let wanted = usize::from(start == Start::Behind)..1 + usize::from(shape.cluster > 1);
        let attributes = if self.capability.0 < 9 { &mut [] } else { &mut all[wanted] };
        let config = self.config(shape, attributes);
        // SAFETY: config, attributes and arguments outlive the call; the driver copies them.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function.0,
                words.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(|e| driver("cuLaunchKernelEx", e))
    }

    /// How many clusters of such blocks the card holds at once.
    pub(crate) fn clusters_at_once(&self, function: Function, shape: Launch) -> Result<usize> {
        self.bind()?;
        let mut attributes = [clusters_of(shape.cluster)];
        let config = self.config(shape, &mut attributes);
        let mut count = 0;
        // SAFETY: config and attributes outlive the call; the function belongs to a module that is never
        // unloaded.
        unsafe { sys::cuOccupancyMaxActiveClusters(&raw mut count, function.0, &raw const config) }
            .result()
            .map_err(|e| driver("cuOccupancyMaxActiveClusters", e))?;
        Ok(count as usize)
    }

    /// A launch's description, which points at the attributes.
    fn config(
        &self,
        shape: Launch,
        attributes: &mut [sys::CUlaunchAttribute],
    ) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: shape.grid[0] as u32,
            gridDimY: shape.grid[1] as u32,
            gridDimZ: shape.grid[2] as u32,
            blockDimX: shape.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared as u32,
            hStream: self.stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        }
    }
}

/// A kernel may start while the one in front ends; it says itself what it waits for.
fn starts_early() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}

/// So many blocks side by side in x are a cluster.
fn clusters_of(blocks: usize) -> sys::CUlaunchAttribute {
    let cluster = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks as u32, y: 1, z: 1 };
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { clusterDim: cluster },
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.bind().is_ok() {
            // SAFETY: nobody else holds the stream or this retain of the context.
            unsafe {
                let _ = result::stream::destroy(self.stream);
                let _ = result::primary_ctx::release(self.handle);
            }
        }
    }
}

/// A kernel in a loaded module.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Function(pub(crate) sys::CUfunction);
// SAFETY: a handle into a module that is never unloaded.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// When a kernel's blocks may start.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// When all blocks of the one in front have: it waits itself.
    Early,
    /// When all in front are done. So does each that is enqueued later.
    Behind,
}

/// Blocks, threads a block, and bytes of dynamic shared memory.
#[derive(Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) grid: [usize; 3],
    pub(crate) threads: usize,
    pub(crate) shared: usize,
    /// Blocks side by side in x that read each other's shared memory.
    pub(crate) cluster: usize,
}

impl Launch {
    pub(crate) fn new(blocks: usize, threads: usize) -> Self {
        Self { grid: [blocks, 1, 1], threads, shared: 0, cluster: 1 }
    }
}

/// Where a kernel's argument lies.
pub(crate) fn address_of<T>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

/// A kernel argument of up to 8 bytes.
pub(crate) struct Arg(u64);
impl From<u64> for Arg {
    fn from(x: u64) -> Self {
        Self(x)
    }
}
impl From<i32> for Arg {
    fn from(x: i32) -> Self {
        Self(u64::from(x as u32))
    }
}
impl From<bool> for Arg {
    fn from(x: bool) -> Self {
        Self(u64::from(x))
    }
}
impl From<f32> for Arg {
    fn from(x: f32) -> Self {
        Self(u64::from(x.to_bits()))
    }
}
impl From<&Tensor> for Arg {
    fn from(x: &Tensor) -> Self {
        Self(x.address())
    }
}
/// A count that the kernel takes as `int` or `long long`.
impl From<usize> for Arg {
    fn from(x: usize) -> Self {
        Self(x as u64)
    }
}

macro_rules! args {
    ($($value:expr),* $(,)?) => { &[$($crate::device::Arg::from($value)),*] };
}
pub(crate) use args;

/// A piece of the card's memory.
pub(crate) struct DeviceMemory {
    device: Arc<Device>,
    address: u64,
    bytes: usize,
}

impl Memory for DeviceMemory {
    fn address(&self) -> u64 {
        self.address
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated by `Device::alloc`, freed once. The driver waits for work on it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// What a query says about work under way.
fn ready(what: &str, status: sys::CUresult) -> Result<bool> {
    match status {
        sys::CUresult::CUDA_SUCCESS => Ok(true),
        sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        error => Err(driver(what, DriverError(error))),
    }
}

pub(crate) fn driver(what: &str, error: DriverError) -> BackendError {
    let text = error.error_string().map_or("unknown", |s| s.to_str().unwrap_or("unknown"));
    fail(format!("{what} failed: {:?}: {text}", error.0))
}

pub(crate) fn fail(message: impl Into<Arc<str>>) -> BackendError {
    BackendError::Device(message.into())
}
