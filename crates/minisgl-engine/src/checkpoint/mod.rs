//! An open checkpoint: a folder in Hugging Face layout, or a GGUF file.

pub mod gguf;
mod mapped;
mod names;
mod safetensors;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use minisgl_tensor::{BlockScale, DType, HostTensor};

use self::gguf::{Gguf, GgufMetadata};
use self::mapped::MappedFile;
use crate::config::ModelConfig;

/// A model's files, mapped: its configuration, and its tensors by the names that Hugging Face
/// gives them, wherever they come from.
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    eos_ids: Vec<u32>,
    gguf: Option<GgufMetadata>,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Entry>,
    left_out: usize,
}

/// What a checkpoint says of one tensor.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// The name that Hugging Face gives it.
    pub name: String,
    /// How elements are stored.
    pub dtype: DType,
    /// Sizes, slowest dimension first.
    pub shape: Vec<usize>,
    /// Bytes in the file.
    pub bytes: usize,
}

struct Entry {
    stored_name: String,
    file: usize,
    range: Range<usize>,
    dtype: Option<DType>,
    shape: Vec<usize>,
    /// Rows lie as llama.cpp's interleaved rotation wants them, in heads of this many rows.
    interleaved_head_dim: Option<usize>,
}

impl Checkpoint {
    /// Opens a folder with `config.json` and safetensors (which may be missing, for dummy
    /// weights), or a `.gguf` file.
    ///
    /// # Errors
    /// Names the file and the tensor or field that is wrong. An architecture that is not
    /// supported is refused here, before any weight is read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            Self::open_folder(path)
        } else if path.exists() {
            Self::open_gguf(path).with_context(|| format!("in {}", path.display()))
        } else {
            bail!("no such file or folder: {}", path.display())
        }
    }

    fn open_folder(folder: &Path) -> Result<Self> {
        let config = read_json(&folder.join("config.json"))?
            .with_context(|| format!("{} has no config.json", folder.display()))?;
        let model = ModelConfig::from_json(&config)
            .with_context(|| format!("in {}", folder.join("config.json").display()))?;
        let generation = read_json(&folder.join("generation_config.json"))?;
        let eos_ids = generation
            .as_ref()
            .and_then(|generation| eos_list(generation.get("eos_token_id")))
            .or_else(|| eos_list(config.get("eos_token_id")))
            .or_else(|| eos_list(config.get("text_config")?.get("eos_token_id")))
            .unwrap_or_default();
        let mut checkpoint = Self {
            path: folder.to_owned(),
            config: model,
            eos_ids,
            gguf: None,
            files: Vec::new(),
            tensors: BTreeMap::new(),
            left_out: 0,
        };
        for file in safetensors::files(folder)? {
            checkpoint.add_safetensors(&file).with_context(|| format!("in {}", file.display()))?;
        }
        Ok(checkpoint)
    }

    fn add_safetensors(&mut self, path: &Path) -> Result<()> {
        let file = MappedFile::open(path)?;
        for stored in safetensors::parse(file.bytes())? {
            let Some(name) = names::from_hugging_face(&stored.name) else {
                self.left_out += 1;
                continue;
            };
            let entry = Entry {
                file: self.files.len(),
                range: stored.range,
                dtype: stored.dtype,
                shape: stored.shape,
                interleaved_head_dim: None,
                stored_name: stored.name,
            };
            self.insert(name, entry)?;
        }
        self.files.push(file);
        Ok(())
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let Gguf { metadata, tensors } = Gguf::parse(file.bytes())?;
        if let Some(parts) = metadata.unsigned("split.count").filter(|parts| *parts > 1) {
            bail!("one of {parts} parts; join them first (llama-gguf-split --merge)");
        }
        let architecture = metadata.string("general.architecture").map(str::to_owned);
        let mut config = ModelConfig::from_gguf(&metadata)?;
        let head_dim = config.head_dim;
        let mut checkpoint = Self {
            path: path.to_owned(),
            eos_ids: gguf_eos_ids(&metadata),
            gguf: Some(metadata),
            files: Vec::new(),
            tensors: BTreeMap::new(),
            left_out: 0,
            config: config.clone(),
        };
        for stored in tensors {
            let Some(name) = names::from_gguf(&stored.name, config.architecture) else {
                checkpoint.left_out += 1;
                continue;
            };
            let interleaved = architecture.as_deref() == Some("llama")
                && (stored.name.contains(".attn_q.") || stored.name.contains(".attn_k."));
            if interleaved && !stored.shape[0].is_multiple_of(head_dim) {
                bail!("{}: {:?} holds no whole heads of {head_dim}", stored.name, stored.shape);
            }
            let entry = Entry {
                stored_name: stored.name,
                file: 0,
                range: stored.range,
                dtype: Some(stored.dtype),
                shape: stored.shape,
                interleaved_head_dim: interleaved.then_some(head_dim),
            };
            checkpoint.insert(name, entry)?;
        }
        checkpoint.files.push(file);
        config.tie_embeddings = !checkpoint.contains("lm_head.weight");
        if let Some(embedding) = checkpoint.tensors.get("model.embed_tokens.weight") {
            // Metadata may leave the vocabulary's size out, or count tokens without padding.
            config.vocab_size = embedding.shape[0];
        }
        if checkpoint.contains("rope_freqs.weight") {
            config.rope.frequency_divisors = checkpoint.floats("rope_freqs.weight")?;
            ensure!(
                config.rope.frequency_divisors.len() == head_dim / 2,
                "rope_freqs.weight has {} factors for heads of {head_dim}",
                config.rope.frequency_divisors.len()
            );
        }
        if let Some(moe) = &mut config.moe {
            let router = |layer| format!("model.layers.{layer}.mlp.gate.weight");
            moe.sparse_layers =
                (0..config.num_layers).map(|layer| checkpoint.contains(&router(layer))).collect();
        }
        config.qkv_bias = checkpoint.contains("model.layers.0.self_attn.q_proj.bias");
        checkpoint.config = config;
        Ok(checkpoint)
    }

    fn insert(&mut self, name: String, entry: Entry) -> Result<()> {
        let stored_name = entry.stored_name.clone();
        ensure!(self.tensors.insert(name, entry).is_none(), "tensor {stored_name} stands twice");
        Ok(())
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Ids that end a sequence, as `generation_config.json`, `config.json` or the GGUF lists them.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// A GGUF file's metadata, which carries its tokenizer and chat template.
    pub fn gguf(&self) -> Option<&GgufMetadata> {
        self.gguf.as_ref()
    }

    /// A file beside `config.json` (tokenizer, templates), where the checkpoint is a folder that
    /// has it.
    pub fn sibling(&self, name: &str) -> Option<PathBuf> {
        let path = self.path.join(name);
        (self.gguf.is_none() && path.is_file()).then_some(path)
    }

    /// Every tensor of the text model, by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo> {
        self.tensors.iter().filter_map(|(name, entry)| {
            Some(TensorInfo {
                name: name.clone(),
                dtype: entry.dtype?,
                shape: entry.shape.clone(),
                bytes: entry.range.len(),
            })
        })
    }

    /// Whether there are no weights at all, so that only dummy weights can be served.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// How many tensors belong to other parts of the model (vision, above all), which are not
    /// served.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor's shape.
    pub(crate) fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.entry(name)?.shape)
    }

    /// Rows `range` of a matrix `[rows, cols]`, or of one expert of `[experts, rows, cols]`. Only
    /// these bytes are read. Ranges of interleaved tensors hold whole heads.
    pub(crate) fn rows(
        &self,
        name: &str,
        expert: Option<usize>,
        range: Range<usize>,
    ) -> Result<HostTensor<'_>> {
        let entry = self.entry(name)?;
        let dtype = entry
            .dtype
            .with_context(|| format!("{}: its element type is not supported", entry.stored_name))?;
        let shape = &entry.shape[usize::from(expert.is_some())..];
        let row_bytes = gguf::tensor_bytes(dtype, &shape[1..])
            .with_context(|| format!("{}: {:?} of {dtype}", entry.stored_name, entry.shape))?;
        ensure!(range.end <= shape[0], "{}: no rows {range:?}", entry.stored_name);
        let first = expert.unwrap_or(0) * shape[0] + range.start;
        let bytes = &self.files[entry.file].bytes()[entry.range.clone()];
        let bytes = &bytes[first * row_bytes..(first + range.len()) * row_bytes];
        let data = match entry.interleaved_head_dim {
            None => Cow::Borrowed(bytes),
            Some(head_dim) => {
                let rows = uninterleave(bytes, row_bytes, head_dim);
                self.files[entry.file].release(bytes);
                Cow::Owned(rows)
            }
        };
        let mut part_shape = shape.to_vec();
        part_shape[0] = range.len();
        let scale = match dtype {
            DType::F8E4M3 => Some(self.scale(name, shape, range)?),
            _ => None,
        };
        Ok(HostTensor { name: entry.stored_name.clone(), dtype, shape: part_shape, data, scale })
    }

    /// The scales of an FP8 matrix's rows: of blocks (`weight_scale_inv`), of rows or of the
    /// whole tensor (`weight_scale`). Both are factors, whatever the first is called.
    fn scale(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<BlockScale> {
        let (count, cols) = (shape[0], shape[1]);
        let scale_name = [format!("{name}_scale_inv"), format!("{name}_scale")]
            .into_iter()
            .find(|scale_name| self.contains(scale_name))
            .with_context(|| format!("{name}: FP8 without a weight_scale or weight_scale_inv"))?;
        let values = self.floats(&scale_name)?;
        let [block_rows, block_cols] = match self.shape(&scale_name)? {
            [] | [1] | [1, 1] => [count, cols],
            [n] | [n, 1] if *n == count => [1, cols],
            [a, b] => {
                let block = self.config.fp8_block;
                let want = [count.div_ceil(block[0]), cols.div_ceil(block[1])];
                ensure!(want == [*a, *b], "{scale_name}: shape [{a}, {b}], expected {want:?}");
                block
            }
            other => bail!("{scale_name}: shape {other:?} fits no known way of scaling"),
        };
        let scale = BlockScale { block: [block_rows, block_cols], values };
        Ok(scale.rows(cols, rows))
    }

    /// A small float tensor, as f32.
    pub(crate) fn floats(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.entry(name)?;
        let bytes = &self.files[entry.file].bytes()[entry.range.clone()];
        let halves = bytes.as_chunks::<2>().0.iter();
        Ok(match entry.dtype {
            Some(DType::F32) => {
                bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
            }
            Some(DType::F16) => halves.map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            Some(DType::BF16) => halves.map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
            _ => bail!("{}: expected a float type", entry.stored_name),
        })
    }

    /// Lets go of the pages that `parts` lie in, once a backend has its own copy: else a model takes
    /// twice its size while it is loaded.
    pub(crate) fn release(&self, parts: &[HostTensor<'_>]) {
        for part in parts {
            if let Cow::Borrowed(bytes) = part.data {
                self.files.iter().for_each(|file| file.release(bytes));
            }
        }
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors
            .get(name)
            .with_context(|| format!("{} has no tensor {name}", self.path.display()))
    }
}

/// GGUF files of the `llama` family hold each head's rows as `x0, y0, x1, y1, …` (for rotation of
/// neighbours); we rotate `x0, x1, …, y0, y1, …`. Rows move whole, so blocks stay as they are.
fn uninterleave(bytes: &[u8], row_bytes: usize, head_dim: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    for head in bytes.chunks_exact(row_bytes * head_dim) {
        for half in 0..2 {
            for pair in 0..head_dim / 2 {
                let row = 2 * pair + half;
                out.extend_from_slice(&head[row * row_bytes..(row + 1) * row_bytes]);
            }
        }
    }
    out
}

fn read_json(path: &Path) -> Result<Option<serde_json::Value>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let value = serde_json::from_slice(&bytes)
        .with_context(|| format!("{} is not JSON", path.display()))?;
    Ok(Some(value))
}

/// One id, or a list of them.
fn eos_list(value: Option<&serde_json::Value>) -> Option<Vec<u32>> {
    let id = |value: &serde_json::Value| u32::try_from(value.as_u64()?).ok();
    match value? {
        serde_json::Value::Array(ids) => Some(ids.iter().filter_map(id).collect()),
        one => Some(vec![id(one)?]),
    }
}

/// The ids that llama.cpp ends a generation at, by metadata and by the names of tokens that end
/// a turn.
fn gguf_eos_ids(metadata: &GgufMetadata) -> Vec<u32> {
    let keys = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
    let mut ids: Vec<u32> =
        keys.iter().filter_map(|key| u32::try_from(metadata.unsigned(key)?).ok()).collect();
    let turn_ends = [
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<|end_of_text|>",
        "<|endoftext|>",
    ];
    let tokens = metadata.strings("tokenizer.ggml.tokens").unwrap_or_default();
    for (id, token) in tokens.iter().enumerate() {
        let id = id as u32;
        if turn_ends.contains(&token.as_str()) && !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}
