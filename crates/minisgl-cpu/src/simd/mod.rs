//! The vector operations that kernels are written in, once for all instruction sets.
//!
//! A kernel is a value that implements `Kernel`: generic over `Simd`, inlined into a function that
//! is compiled with the instruction set's features by `Isa::run`. A new instruction set is one
//! file that implements `Simd`, and a line in `Isa`.

#[cfg(target_arch = "x86_64")]
mod avx2;
pub mod math;
mod portable;

use half::{bf16, f16};
use minisgl_tensor::{BackendError, Result};

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

/// Vectors of sixteen lanes. A value of the type is the proof that this machine has the
/// instructions.
pub trait Simd: Copy + Send + Sync + 'static {
    /// 16 f32.
    type F32: Copy;
    /// 16 lanes of 4 bytes.
    type Bytes: Copy;
    /// A running sum of products with 4-bit codes, a lane each; good for 32 of them.
    type NibbleSum: Copy;
    /// A running sum of products with 8-bit codes.
    type ByteSum: Copy;

    fn splat(self, x: f32) -> Self::F32;
    fn load(self, from: &[f32; LANES]) -> Self::F32;
    fn store(self, x: Self::F32, to: &mut [f32; LANES]);
    fn load_f16(self, from: &[f16; LANES]) -> Self::F32;
    fn load_bf16(self, from: &[bf16; LANES]) -> Self::F32;
    fn load_i8(self, from: &[i8; LANES]) -> Self::F32;
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a · b + c`, rounded once where the machine can.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The sum of all lanes, in an order of its own that never changes.
    fn sum(self, x: Self::F32) -> f32;
    /// Lane j of vector i becomes lane i of vector j.
    fn transpose(self, x: [Self::F32; LANES]) -> [Self::F32; LANES];

    fn load_bytes(self, from: &[u8; 64]) -> Self::Bytes;
    /// The low and the high four bits of every byte.
    fn nibbles(self, x: Self::Bytes) -> (Self::Bytes, Self::Bytes);
    fn nibble_zero(self) -> Self::NibbleSum;
    /// Adds the dot product of each lane's four unsigned codes, at most 15, with `x`, whose
    /// elements are at least −127.
    fn nibble_dot(self, sum: Self::NibbleSum, w: Self::Bytes, x: [i8; 4]) -> Self::NibbleSum;
    fn nibble_total(self, sum: Self::NibbleSum) -> Self::F32;
    fn byte_zero(self) -> Self::ByteSum;
    /// As `nibble_dot` with signed codes of 8 bits.
    fn byte_dot(self, sum: Self::ByteSum, w: Self::Bytes, x: [i8; 4]) -> Self::ByteSum;
    fn byte_total(self, sum: Self::ByteSum) -> Self::F32;
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
    /// What `MINISGL_CPU_ISA` says (`avx2`, `portable`), else the best there is.
    #[default]
    Auto,
    /// AVX2 or an error.
    Avx2,
    /// Plain Rust.
    Portable,
}

impl Isa {
    /// Finds what `choice` asks for. Errors: the machine has not got it.
    pub fn detect(choice: IsaChoice) -> Result<Self> {
        let choice = match (choice, std::env::var(ISA_VARIABLE).ok().as_deref()) {
            (IsaChoice::Auto, Some("avx2")) => IsaChoice::Avx2,
            (IsaChoice::Auto, Some("portable")) => IsaChoice::Portable,
            (IsaChoice::Auto, Some(other)) if !other.is_empty() && other != "auto" => {
                let message = format!("{ISA_VARIABLE} is {other:?}; it can be avx2 or portable");
                return Err(BackendError::Unsupported(message.into()));
            }
            _ => choice,
        };
        #[cfg(target_arch = "x86_64")]
        if choice != IsaChoice::Portable
            && let Some(avx2) = avx2::Avx2::detect()
        {
            return Ok(Isa::Avx2(avx2));
        }
        if choice == IsaChoice::Avx2 {
            return Err(BackendError::Unsupported("this machine has no AVX2".into()));
        }
        Ok(Isa::Portable(portable::Portable))
    }

    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "AVX2",
            Isa::Portable(_) => "portable",
        }
    }

    /// Runs `kernel` as compiled for this instruction set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(avx2) => avx2.run(kernel),
            Isa::Portable(portable) => kernel.run(portable),
        }
    }
}
