//! NCCL, opened at run time: the few functions that a group of ranks in one process needs.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libloading::Library;
use minisgl_tensor::Result;

use crate::device::{Device, fail};

type Handle = *mut c_void;
type Status = c_int;

const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 7;
const SUM: c_int = 0;

/// `ncclDataType_t`.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Bytes = 0,
    F32 = 7,
    BF16 = 9,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct UniqueId([c_char; 128]);

/// The front of `ncclConfig_t` as version 2.18 has it; newer libraries fill in the rest.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    ctas_min: c_int,
    ctas_max: c_int,
    net_name: *const c_char,
    split_share: c_int,
    padding: c_int,
}

impl Config {
    /// Calls only enqueue, so that none can wait for a rank that is gone.
    fn not_blocking() -> Self {
        const UNDEFINED: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_800,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            ctas_min: UNDEFINED,
            ctas_max: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
            padding: UNDEFINED,
        }
    }
}

macro_rules! functions {
    ($($field:ident: $symbol:literal, fn($($arg:ty),*) -> $out:ty;)*) => {
        struct Functions { $($field: unsafe extern "C" fn($($arg),*) -> $out,)* }

        impl Functions {
            fn find(library: &Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of nccl.h; the library is never closed.
                unsafe { Ok(Self { $($field: *library.get($symbol)?,)* }) }
            }
        }
    };
}

functions! {
    version: b"ncclGetVersion\0", fn(*mut c_int) -> Status;
    error_string: b"ncclGetErrorString\0", fn(Status) -> *const c_char;
    last_error: b"ncclGetLastError\0", fn(Handle) -> *const c_char;
    unique_id: b"ncclGetUniqueId\0", fn(*mut UniqueId) -> Status;
    group_start: b"ncclGroupStart\0", fn() -> Status;
    group_end: b"ncclGroupEnd\0", fn() -> Status;
    init_rank: b"ncclCommInitRankConfig\0",
        fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> Status;
    async_error: b"ncclCommGetAsyncError\0", fn(Handle, *mut Status) -> Status;
    abort: b"ncclCommAbort\0", fn(Handle) -> Status;
    all_reduce: b"ncclAllReduce\0",
        fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Status;
    all_gather: b"ncclAllGather\0",
        fn(*const c_void, *mut c_void, usize, c_int, Handle, *mut c_void) -> Status;
}

/// The library.
struct Nccl {
    functions: Functions,
}

impl Nccl {
    fn open() -> Result<Self> {
        const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
        // SAFETY: the library's initialisers do nothing but set it up.
        let open = |name: &str| unsafe { Library::new(name) };
        let library = NAMES.into_iter().find_map(|name| open(name).ok()).ok_or_else(|| {
            fail(
                "NCCL, with which several GPUs compute together, was not found: libnccl.so.2 is \
                 not on the loader's path; install it (`pip install nvidia-nccl-cu13`) and add \
                 its folder to LD_LIBRARY_PATH",
            )
        })?;
        let functions = Functions::find(&library)
            .map_err(|error| fail(format!("NCCL is older than 2.18: {error}")))?;
        // It has threads of its own, which may run longer than any communicator.
        std::mem::forget(library);
        Ok(Self { functions })
    }

    fn check(&self, what: &str, status: Status) -> Result<()> {
        if status == SUCCESS || status == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both give texts that live as long as the library or until the next error.
        let [error, last] = unsafe {
            let (error, last) = (
                (self.functions.error_string)(status),
                (self.functions.last_error)(std::ptr::null_mut()),
            );
            [error, last].map(|text| match text.is_null() {
                true => String::new(),
                false => CStr::from_ptr(text).to_string_lossy().into_owned(),
            })
        };
        Err(fail(format!("{what} failed: {error}: {last}")))
    }
}

/// One rank's end of an NCCL communicator. Dropping it ends what it is doing, on the device too.
pub(crate) struct Communicator {
    nccl: Arc<Nccl>,
    handle: Handle,
    /// Its context must live until the end of the communicator.
    _device: Arc<Device>,
}

// SAFETY: NCCL's handles are not bound to a thread; one thread at a time uses this one.
unsafe impl Send for Communicator {}

impl Communicator {
    /// A communicator over `devices`, one end each.
    ///
    /// # Errors
    /// If NCCL is missing or too old, refuses the devices, or is not ready within `timeout`.
    pub(crate) fn connect(devices: &[Arc<Device>], timeout: Duration) -> Result<Vec<Self>> {
        let nccl = Arc::new(Nccl::open()?);
        let calls = &nccl.functions;
        let mut version = 0;
        let mut id = UniqueId([0; 128]);
        // SAFETY: both point to values of this frame.
        unsafe {
            nccl.check("ncclGetVersion", (calls.version)(&raw mut version))?;
            nccl.check("ncclGetUniqueId", (calls.unique_id)(&raw mut id))?;
        }
        tracing::info!(version, ranks = devices.len(), "connecting through NCCL");
        let mut handles = vec![std::ptr::null_mut(); devices.len()];
        // SAFETY: group_end follows group_start whatever happens in between.
        let outcome = unsafe {
            nccl.check("ncclGroupStart", (calls.group_start)())?;
            let ranks = devices.iter().zip(&mut handles).enumerate();
            let outcome = ranks.into_iter().try_for_each(|(rank, (device, handle))| {
                device.bind()?;
                let (count, rank) = (devices.len() as c_int, rank as c_int);
                let mut config = Config::not_blocking();
                let status = (calls.init_rank)(handle, count, id, rank, &raw mut config);
                nccl.check("ncclCommInitRankConfig", status)
            });
            let end = nccl.check("ncclGroupEnd", (calls.group_end)());
            outcome.and(end)
        };
        // From here on the handles are owned, whatever the outcome.
        let ends: Vec<Self> = handles
            .into_iter()
            .zip(devices)
            .filter(|(handle, _)| !handle.is_null())
            .map(|(handle, device)| Self {
                nccl: Arc::clone(&nccl),
                handle,
                _device: Arc::clone(device),
            })
            .collect();
        outcome?;
        let start = Instant::now();
        for end in &ends {
            while !end.state()? {
                if start.elapsed() > timeout {
                    return Err(fail(format!("NCCL has not connected the ranks in {timeout:?}")));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(ends)
    }

    /// Whether what was called last has been enqueued; an error if NCCL has met one since.
    pub(crate) fn state(&self) -> Result<bool> {
        let mut status = SUCCESS;
        // SAFETY: the handle lives; the status is of this frame.
        let outcome = unsafe { (self.nccl.functions.async_error)(self.handle, &raw mut status) };
        self.nccl.check("ncclCommGetAsyncError", outcome)?;
        self.nccl.check("a collective", status)?;
        Ok(status != IN_PROGRESS)
    }

    /// Enqueues `data = Σ over ranks of data`.
    ///
    /// # Safety
    /// `count` elements lie at `data`, in memory of the rank's device, which is the thread's.
    pub(crate) unsafe fn all_reduce(
        &self,
        data: u64,
        count: usize,
        kind: Kind,
        device: &Device,
    ) -> Result<()> {
        let data = data as *mut c_void;
        let (call, stream) = (self.nccl.functions.all_reduce, device.stream.cast());
        // SAFETY: as the caller promises; in place is allowed.
        let status = unsafe { call(data, data, count, kind as c_int, SUM, self.handle, stream) };
        self.nccl.check("ncclAllReduce", status)
    }

    /// Enqueues `out = the parts of all ranks, in their order`.
    ///
    /// # Safety
    /// As `all_reduce`: `bytes` at `part`, and as many times ranks at `out`.
    pub(crate) unsafe fn all_gather(
        &self,
        part: u64,
        bytes: usize,
        out: u64,
        device: &Device,
    ) -> Result<()> {
        let (part, out) = (part as *const c_void, out as *mut c_void);
        let (call, stream) = (self.nccl.functions.all_gather, device.stream.cast());
        // SAFETY: as the caller promises.
        let status = unsafe { call(part, out, bytes, Kind::Bytes as c_int, self.handle, stream) };
        self.nccl.check("ncclAllGather", status)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // SAFETY: the handle is given up here and nowhere else.
        let status = unsafe { (self.nccl.functions.abort)(self.handle) };
        if let Err(error) = self.nccl.check("ncclCommAbort", status) {
            tracing::warn!("{error}");
        }
    }
}
