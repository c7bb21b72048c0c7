//! The vector operations that kernels are written in, once for all instruction sets.
//!
//! A kernel is a value that implements `Kernel`: generic over `Simd`, inlined into a function that
//! is compiled with the instruction set's features by `Isa::run`. A new instruction set is one
//! file that implements `Simd`, and a line in `Isa`.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod math;
mod portable;
mod unit;

use bytemuck::{Pod, Zeroable};
use half::f16;
use minisgl_tensor::{BackendError, Result};

#[cfg(target_arch = "x86_64")]
pub use amx::Amx;
pub use unit::{MatrixUnit, Products, Sums};

/// `[f(0), f(1), …]`. Neither `array::map` nor `array::from_fn` does in a kernel: they are functions
/// compiled without its instruction set, and vectors cross their border through memory.
macro_rules! array {
    ($count:expr, $zero:expr, |$i:ident| $element:expr) => {{
        let mut array = [$zero; $count];
        let mut $i = 0;
        while $i < $count {
            array[$i] = $element;
            $i += 1;
        }
        array
    }};
}
pub(crate) use array;

/// Rows of a tile of weights, and lanes of a vector, whatever the machine's registers hold.
pub const LANES: usize = 16;

/// A register's bytes where they do not cross a border of cache lines.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Line(pub [u8; 64]);

/// Something that begins a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Aligned<T>(pub T);

/// Vectors of sixteen lanes. A value of the type is the proof that this machine has the
/// instructions.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Rows of plain products that registers have room for.
    const ROWS: usize;
    /// 16 f32.
    type F32: Copy;
    /// 16 lanes of 4 bytes.
    type Bytes: Copy;
    /// A running sum of products with 4-bit codes, a lane each; good for 32 of them.
    type NibbleSum: Copy;
    /// A running sum of products with 8-bit codes.
    type ByteSum: Copy;

    /// Fetches what lies `ahead` bytes behind `line`, and may be no memory at all: into the second cache, as more lines can be
    /// on their way there than to the first one. Into the first on the one machine with AMX that this was measured on.
    fn will_read(self, line: &u8, ahead: usize);
    /// Fetches the line that will be written to.
    fn will_write(self, line: &f32);
    fn splat(self, x: f32) -> Self::F32;
    fn load(self, from: &[f32; LANES]) -> Self::F32;
    fn store(self, x: Self::F32, to: &mut [f32; LANES]);
    fn load_f16(self, from: &[f16; LANES]) -> Self::F32;
    fn load_i8(self, from: &[i8; LANES]) -> Self::F32;
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a · b + c`, rounded once where the machine can.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// To the nearest integer.
    fn round(self, x: Self::F32) -> Self::F32;
    /// As `math::exp`.
    fn exp(self, x: Self::F32) -> Self::F32;
    /// The largest lane.
    fn highest(self, x: Self::F32) -> f32;
    /// The sum of all lanes, in an order of its own that never changes.
    fn sum(self, x: Self::F32) -> f32;
    /// Lane j of vector i becomes lane i of vector j.
    fn transpose(self, x: [Self::F32; LANES]) -> [Self::F32; LANES];

    /// Whole numbers from −128 to 127.
    fn store_i8(self, x: Self::F32, to: &mut [i8; LANES]);
    fn load_bytes(self, from: &[u8; 64]) -> Self::Bytes;
    /// The low and the high four bits of every byte.
    fn nibbles(self, x: Self::Bytes) -> (Self::Bytes, Self::Bytes);
    fn nibble_zero(self) -> Self::NibbleSum;
    /// Adds the dot product of each lane's four unsigned codes, at most 15, with `x`, whose
    /// elements are at least −127.
    fn nibble_dot(self, sum: Self::NibbleSum, w: Self::Bytes, x: [i8; 4]) -> Self::NibbleSum;
    fn nibble_total(self, sum: Self::NibbleSum) -> Self::F32;
    /// A sum that `byte_dot` adds to. `shifted` is −128 · Σ x over all that will be added, for
    /// those who shift codes to unsigned.
    fn byte_start(self, shifted: i32) -> Self::ByteSum;
    /// As `nibble_dot` with signed codes of 8 bits.
    fn byte_dot(self, sum: Self::ByteSum, w: Self::Bytes, x: [i8; 4]) -> Self::ByteSum;
    fn byte_total(self, sum: Self::ByteSum) -> Self::F32;

    /// The first and the second bf16 of every lane.
    fn widen(self, pairs: Self::Bytes) -> (Self::F32, Self::F32);

    /// What multiplies whole matrices.
    type Unit: MatrixUnit;
    /// It, where this machine has one.
    fn unit(self) -> Option<Self::Unit>;
    /// Its sums in f32.
    fn convert(self, from: &[i32; LANES]) -> Self::F32;
    fn store_bytes(self, x: Self::Bytes, to: &mut [u8; 64]);
}

/// A computation to be compiled for every instruction set.
pub trait Kernel {
    /// Its result.
    type Output;
    /// Runs it. Implementations are `#[inline(always)]`.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug)]
pub enum Isa {
    /// AVX-512 with VNNI, and AMX where it is wanted.
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    /// AVX2, FMA and F16C: x86-64 since 2013.
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    /// Plain Rust.
    Portable(portable::Portable),
}

/// The environment variable that chooses the instruction set where `IsaChoice::Auto` would.
pub const ISA_VARIABLE: &str = "MINISGL_CPU_ISA";

/// Which instruction set to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IsaChoice {
    /// What `MINISGL_CPU_ISA` says (`amx`, `avx512`, `avx2`, `portable`), else the best there is.
    #[default]
    Auto,
    /// AVX-512 and AMX's tiles, or an error.
    Amx,
    /// AVX-512 with VNNI, or an error.
    Avx512,
    /// AVX2 or an error.
    Avx2,
    /// Plain Rust.
    Portable,
}

impl IsaChoice {
    const NAMED: [(&'static str, Self); 4] = [
        ("amx", Self::Amx),
        ("avx512", Self::Avx512),
        ("avx2", Self::Avx2),
        ("portable", Self::Portable),
    ];

    fn from_environment() -> Result<Self> {
        let name = std::env::var(ISA_VARIABLE).unwrap_or_default();
        if name.is_empty() || name == "auto" {
            return Ok(Self::Auto);
        }
        let found = Self::NAMED.iter().find(|(known, _)| *known == name);
        found.map(|(_, choice)| *choice).ok_or_else(|| {
            let names = Self::NAMED.map(|(known, _)| known).join(", ");
            BackendError::Unsupported(
                format!("{ISA_VARIABLE} is {name:?}; it can be one of {names}").into(),
            )
        })
    }
}

impl Isa {
    /// Finds what `choice` asks for. Errors: the machine has not got it.
    pub fn detect(choice: IsaChoice) -> Result<Self> {
        let choice = match choice {
            IsaChoice::Auto => IsaChoice::from_environment()?,
            named => named,
        };
        Self::all()
            .find(|isa| matches!(choice, IsaChoice::Auto) || isa.choice() == choice)
            .ok_or_else(|| {
                BackendError::Unsupported(format!("this machine has no {choice:?}").into())
            })
    }

    /// What this machine has, the best first.
    fn all() -> impl Iterator<Item = Self> {
        let portable = [Isa::Portable(portable::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = avx512::Avx512::detect();
            let amx = avx512.and_then(avx512::Avx512::with_amx);
            let found = [
                amx.map(Isa::Avx512),
                avx512.map(Isa::Avx512),
                avx2::Avx2::detect().map(Isa::Avx2),
            ];
            found.into_iter().flatten().chain(portable)
        }
        #[cfg(not(target_arch = "x86_64"))]
        portable.into_iter()
    }

    fn choice(self) -> IsaChoice {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(avx512) if avx512.unit().is_some() => IsaChoice::Amx,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => IsaChoice::Avx512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => IsaChoice::Avx2,
            Isa::Portable(_) => IsaChoice::Portable,
        }
    }

    /// For messages.
    pub fn name(self) -> &'static str {
        match self.choice() {
            IsaChoice::Amx => "AVX-512, AMX",
            IsaChoice::Avx512 => "AVX-512",
            IsaChoice::Avx2 => "AVX2",
            IsaChoice::Auto | IsaChoice::Portable => "portable",
        }
    }

    /// Whether it has a `MatrixUnit`.
    pub fn has_unit(self) -> bool {
        self.choice() == IsaChoice::Amx
    }

    /// Runs `kernel` as compiled for this instruction set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(avx512) => avx512.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(avx2) => avx2.run(kernel),
            Isa::Portable(portable) => kernel.run(portable),
        }
    }
}
