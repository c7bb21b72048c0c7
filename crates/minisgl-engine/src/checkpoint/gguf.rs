//! GGUF, versions 2 and 3 (the format is described in ggml's `docs/gguf.md`).
//!
//! No number in the file is trusted: every length is checked against the bytes that are left
//! before anything is allocated or sliced.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use minisgl_tensor::DType;

/// A file's header: metadata and where its tensors lie.
pub struct Gguf {
    pub metadata: GgufMetadata,
    pub tensors: Vec<GgufTensor>,
}

/// A tensor's place in the file. `shape` is slowest dimension first, unlike in the file itself.
pub struct GgufTensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub range: Range<usize>,
}

/// Metadata by key.
#[derive(Clone, Debug, Default)]
pub struct GgufMetadata(BTreeMap<String, GgufValue>);

/// A metadata value. Integers of all widths are one kind, and so are floats.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum GgufValue {
    Bool(bool),
    Int(i64),
    Float(f64),
    String(String),
    Bools(Vec<bool>),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Strings(Vec<String>),
}

impl GgufMetadata {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        self.0.get(key)
    }

    /// A string.
    pub fn string(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            GgufValue::String(value) => Some(value),
            _ => None,
        }
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Option<&[String]> {
        match self.get(key)? {
            GgufValue::Strings(value) => Some(value),
            _ => None,
        }
    }

    /// An array of integers.
    pub fn ints(&self, key: &str) -> Option<&[i64]> {
        match self.get(key)? {
            GgufValue::Ints(value) => Some(value),
            _ => None,
        }
    }

    /// An array of floats.
    pub fn floats(&self, key: &str) -> Option<&[f32]> {
        match self.get(key)? {
            GgufValue::Floats(value) => Some(value),
            _ => None,
        }
    }

    /// An integer that is not negative.
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            GgufValue::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// A number.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            GgufValue::Float(value) => Some(*value),
            GgufValue::Int(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            GgufValue::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// All keys and values, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &GgufValue)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }
}

impl Gguf {
    /// Parses a whole file's bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader { bytes, at: 0 };
        ensure!(reader.take(4)? == b"GGUF", "not a GGUF file: it does not begin with \"GGUF\"");
        let version = reader.u32()?;
        ensure!(
            (2..=3).contains(&version),
            "GGUF version {version} is not supported (2 and 3 are, little-endian)"
        );
        let tensor_count = reader.u64()?;
        let metadata_count = reader.u64()?;
        let metadata = read_metadata(&mut reader, metadata_count)?;
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(_) => metadata.unsigned("general.alignment").unwrap_or(0),
        };
        ensure!(
            alignment.is_power_of_two() && alignment <= 1 << 20,
            "general.alignment is {alignment}, not a power of two"
        );
        let mut infos: Vec<(String, DType, Vec<usize>, u64)> = Vec::new();
        for index in 0..tensor_count {
            let info = read_tensor_info(&mut reader)
                .with_context(|| format!("tensor {index} of {tensor_count}"))?;
            infos.push(info);
        }
        let data_start = reader.at.next_multiple_of(alignment as usize);
        let tensors = place_tensors(infos, data_start, alignment, bytes.len())?;
        Ok(Self { metadata, tensors })
    }
}

fn read_metadata(reader: &mut Reader<'_>, count: u64) -> Result<GgufMetadata> {
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let key = reader.string().with_context(|| format!("metadata key {index} of {count}"))?;
        let value = read_value(reader).with_context(|| format!("metadata {key:?}"))?;
        ensure!(metadata.insert(key.clone(), value).is_none(), "metadata {key:?} stands twice");
    }
    Ok(GgufMetadata(metadata))
}

fn read_tensor_info(reader: &mut Reader<'_>) -> Result<(String, DType, Vec<usize>, u64)> {
    let name = reader.string()?;
    let dimensions = reader.u32()?;
    ensure!((1..=4).contains(&dimensions), "{name}: {dimensions} dimensions (1 to 4 are allowed)");
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        let size = usize::try_from(reader.u64()?).with_context(|| format!("{name}: its shape"))?;
        shape.insert(0, size);
    }
    let dtype = dtype_of(reader.u32()?).with_context(|| format!("{name}: its type"))?;
    Ok((name, dtype, shape, reader.u64()?))
}

fn place_tensors(
    infos: Vec<(String, DType, Vec<usize>, u64)>,
    data_start: usize,
    alignment: u64,
    file_len: usize,
) -> Result<Vec<GgufTensor>> {
    let mut tensors = Vec::new();
    for (name, dtype, shape, offset) in infos {
        let bytes = tensor_bytes(dtype, &shape)
            .with_context(|| format!("{name}: a {dtype} tensor cannot have shape {shape:?}"))?;
        ensure!(offset.is_multiple_of(alignment), "{name}: offset {offset} is not aligned");
        let range = usize::try_from(offset)
            .ok()
            .and_then(|offset| data_start.checked_add(offset))
            .and_then(|start| Some(start..start.checked_add(bytes)?))
            .filter(|range| range.end <= file_len);
        let Some(range) = range else {
            bail!("{name}: {bytes} bytes at {offset} lie past the end of the file; is it whole?");
        };
        tensors.push(GgufTensor { name, dtype, shape, range });
    }
    Ok(tensors)
}

/// The bytes of a tensor whose rows are whole blocks; `None` otherwise or on overflow.
pub fn tensor_bytes(dtype: DType, shape: &[usize]) -> Option<usize> {
    let row = dtype.bytes_of(*shape.last().unwrap_or(&1))?;
    let rows = &shape[..shape.len().saturating_sub(1)];
    rows.iter().try_fold(row, |bytes, size| bytes.checked_mul(*size))
}

/// GGML's type numbers.
fn dtype_of(code: u32) -> Result<DType> {
    Ok(match code {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Q4_0,
        3 => DType::Q4_1,
        6 => DType::Q5_0,
        7 => DType::Q5_1,
        8 => DType::Q8_0,
        12 => DType::Q4K,
        13 => DType::Q5K,
        14 => DType::Q6K,
        30 => DType::BF16,
        _ => bail!(
            "GGML type {code} is not supported (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, \
             Q4_K, Q5_K and Q6_K are)"
        ),
    })
}

fn read_value(reader: &mut Reader<'_>) -> Result<GgufValue> {
    match reader.u32()? {
        9 => read_array(reader),
        kind => read_scalar(reader, kind),
    }
}

fn read_scalar(reader: &mut Reader<'_>, kind: u32) -> Result<GgufValue> {
    Ok(match kind {
        0 => GgufValue::Int(i64::from(reader.array::<1>()?[0])),
        1 => GgufValue::Int(i64::from(i8::from_le_bytes(reader.array()?))),
        2 => GgufValue::Int(i64::from(u16::from_le_bytes(reader.array()?))),
        3 => GgufValue::Int(i64::from(i16::from_le_bytes(reader.array()?))),
        4 => GgufValue::Int(i64::from(reader.u32()?)),
        5 => GgufValue::Int(i64::from(i32::from_le_bytes(reader.array()?))),
        6 => GgufValue::Float(f64::from(f32::from_le_bytes(reader.array()?))),
        7 => GgufValue::Bool(reader.array::<1>()?[0] != 0),
        8 => GgufValue::String(reader.string()?),
        // A u64 above i64::MAX is no count or id of anything that we read.
        10 => GgufValue::Int(i64::try_from(reader.u64()?)?),
        11 => GgufValue::Int(i64::from_le_bytes(reader.array()?)),
        12 => GgufValue::Float(f64::from_le_bytes(reader.array()?)),
        _ => bail!("unknown metadata type {kind}"),
    })
}

fn read_array(reader: &mut Reader<'_>) -> Result<GgufValue> {
    let kind = reader.u32()?;
    let count = reader.u64()?;
    let least_bytes: u64 = match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        9 => bail!("nested arrays are not supported"),
        _ => bail!("unknown metadata type {kind} in an array"),
    };
    let left = (reader.bytes.len() - reader.at) as u64;
    ensure!(
        count.checked_mul(least_bytes).is_some_and(|bytes| bytes <= left),
        "an array of {count} elements runs past the end of the file"
    );
    let mut scalars = (0..count).map(|_| read_scalar(reader, kind));
    Ok(match kind {
        7 => GgufValue::Bools(collect(&mut scalars, |value| match value {
            GgufValue::Bool(value) => Some(value),
            _ => None,
        })?),
        6 | 12 => GgufValue::Floats(collect(&mut scalars, |value| match value {
            GgufValue::Float(value) => Some(value as f32),
            _ => None,
        })?),
        8 => GgufValue::Strings(collect(&mut scalars, |value| match value {
            GgufValue::String(value) => Some(value),
            _ => None,
        })?),
        _ => GgufValue::Ints(collect(&mut scalars, |value| match value {
            GgufValue::Int(value) => Some(value),
            _ => None,
        })?),
    })
}

fn collect<T>(
    values: &mut dyn Iterator<Item = Result<GgufValue>>,
    pick: impl Fn(GgufValue) -> Option<T>,
) -> Result<Vec<T>> {
    values.map(|value| pick(value?).context("an array mixes types")).collect()
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let taken = self.at.checked_add(count).and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.with_context(|| {
            format!("{count} bytes at {} run past the end of the file", self.at)
        })?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("took N bytes"))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Bytes that are not UTF-8 become replacement characters: a vocabulary may hold some.
    fn string(&mut self) -> Result<String> {
        let count = usize::try_from(self.u64()?)?;
        Ok(String::from_utf8_lossy(self.take(count)?).into_owned())
    }
}
