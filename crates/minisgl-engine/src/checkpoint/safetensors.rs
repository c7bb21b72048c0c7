//! Safetensors: one file, or several with an index.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use minisgl_tensor::DType;
use safetensors::{Dtype, SafeTensors};

/// A tensor's place in its file; `None` for an element type that no weight has.
pub struct StoredTensor {
    pub name: String,
    pub dtype: Option<DType>,
    pub shape: Vec<usize>,
    pub range: Range<usize>,
}

/// The files that make up the checkpoint in `folder`: those that its index names, else all.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let index = folder.join("model.safetensors.index.json");
    if index.exists() {
        return indexed_files(folder, &index)
            .with_context(|| format!("{} is not a safetensors index", index.display()));
    }
    let single = folder.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let mut files = Vec::new();
    for entry in
        std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?
    {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn indexed_files(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(&std::fs::read(index)?)?;
    let mut names: Vec<String> = index.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    for name in &names {
        let is_plain = Path::new(name).components().count() == 1 && !name.starts_with('.');
        ensure!(is_plain, "it names {name:?}, which is not a file beside it");
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// Parses a file's header. The safetensors crate checks that offsets are in bounds, in order and
/// without gaps, and that they agree with the shapes.
pub fn parse(bytes: &[u8]) -> Result<Vec<StoredTensor>> {
    let (header_len, header) = SafeTensors::read_metadata(bytes)?;
    let data_start = header_len.checked_add(8).context("the header's length overflows")?;
    let mut tensors = Vec::new();
    for (name, info) in header.tensors() {
        let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
        if range.end > bytes.len() {
            bail!("{name}: its bytes lie past the end of the file; is it whole?");
        }
        let dtype = dtype_of(info.dtype);
        tensors.push(StoredTensor { name, dtype, shape: info.shape.clone(), range });
    }
    Ok(tensors)
}

fn dtype_of(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::F8_E4M3 => DType::F8E4M3,
        Dtype::I32 => DType::I32,
        Dtype::U8 => DType::U8,
        _ => return None,
    })
}
