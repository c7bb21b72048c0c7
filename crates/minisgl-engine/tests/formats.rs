//! The same model from other files: GGUF and FP8 give what the plain safetensors give.

mod gguf_writer;
#[expect(dead_code, reason = "the switches for failures are for other tests")]
mod reference;
#[expect(dead_code, reason = "the stored logits are for other tests")]
mod tiny;

use std::path::Path;
use std::sync::Arc;

use gguf_writer::{Stored, Tensors, merge_experts, q8_0, write_gguf};
use minisgl_engine::{Checkpoint, EngineOptions, KvSize, LocalEngine};
use minisgl_scheduler::engine::Engine;
use minisgl_scheduler::plan::*;
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_tensor::{Alone, Backend, Precision};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;
use tiny::Tiny;

fn read(tiny: &Tiny) -> Tensors {
    let bytes = std::fs::read(tiny.folder().join("model.safetensors")).unwrap();
    SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| {
            let values = bytemuck::allocation::pod_collect_to_vec(view.data());
            (name.to_owned(), (view.shape().to_vec(), values))
        })
        .collect()
}

/// Greedy tokens, all prefilled at once, decoded ahead.
fn generate(path: &Path, prompt: &[u32], ranks: usize) -> Vec<u32> {
    let options = EngineOptions {
        precision: Precision::Exact,
        page_size: 64,
        kv_size: KvSize::Pages(1),
        running_requests_max: 1,
        seq_len_max: Some(64),
        step_tokens_max: 64,
        graph_batch_max: 0,
        dummy_weights: false,
        note_device_times: false,
    };
    let ranks = match ranks {
        1 => vec![(
            Arc::new(reference::Reference::default()) as Arc<dyn Backend>,
            Arc::new(Alone) as _,
        )],
        n => reference::group(n).into_iter().map(|(b, c)| (b as Arc<dyn Backend>, c)).collect(),
    };
    let checkpoint = Arc::new(Checkpoint::open(path).unwrap());
    let mut engine = LocalEngine::new(checkpoint, &options, ranks).unwrap();
    let params = Arc::new(SamplingParams { temperature: 0.0, ..SamplingParams::default() });
    let mut step = |cached_len: usize, input: RowInput, extend_len: usize| {
        let output = RowOutput::Sample(Arc::clone(&params));
        let (cached_len, extend_len) = (cached_len as u32, extend_len as u32);
        let page_updates = match cached_len {
            0 => vec![PageUpdate { slot: Slot(0), index: 0, page: PageId(0) }],
            _ => Vec::new(),
        };
        let rows = vec![PlanRow { slot: Slot(0), cached_len, extend_len, input, output }];
        let plan =
            StepPlan { step: 0, rows, page_updates, adjustments: None, shared_prefixes: vec![] };
        let in_flight = engine.launch(Arc::new(plan)).unwrap();
        engine.wait(in_flight).unwrap().tokens[0].unwrap()
    };
    let mut tokens = vec![step(0, RowInput::Tokens(prompt.to_vec()), prompt.len())];
    while tokens.len() < 32 {
        tokens.push(step(prompt.len() + tokens.len() - 1, RowInput::Sampled, 1));
    }
    tokens
}

fn q8_0_back(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks(34)
        .flat_map(|b| {
            let d = half::f16::from_le_bytes([b[0], b[1]]).to_f32();
            b[2..].iter().map(move |q| d * f32::from(*q as i8)).collect::<Vec<_>>()
        })
        .collect()
}

fn config(tiny: &Tiny) -> Value {
    serde_json::from_slice(&std::fs::read(tiny.folder().join("config.json")).unwrap()).unwrap()
}

#[test]
fn gguf_files_give_the_stored_tokens() {
    for (name, architecture) in [
        ("llama", "llama"),
        ("llama-linear", "llama"),
        ("llama-yarn", "llama"),
        ("mistral", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("qwen3-moe", "qwen3moe"),
    ] {
        let tiny = Tiny::load(name);
        let path = tiny.folder().join("model.gguf");
        let mut tensors = merge_experts(read(&tiny));
        if name == "llama" {
            tensors.insert("rope_freqs.weight".into(), llama3_divisors(&config(&tiny)));
        }
        write_gguf(&path, architecture, &config(&tiny), &tensors, false);
        assert_eq!(generate(&path, &tiny.prompt, 1), tiny.tokens, "{name}");
    }
}

/// A GGUF has no field for Llama 3's scaling: the converter computes what it does to each pair.
fn llama3_divisors(config: &Value) -> Stored {
    let rope = &config["rope_parameters"];
    let number = |name: &str| rope[name].as_f64().unwrap();
    let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
    let (factor, original) = (number("factor"), number("original_max_position_embeddings"));
    let head_dim = config["head_dim"].as_u64().unwrap() as usize;
    let divisors = (0..head_dim / 2).map(|pair| {
        let exponent = 2.0 * pair as f64 / head_dim as f64;
        let wavelength = std::f64::consts::TAU * number("rope_theta").powf(exponent);
        let smooth = (original / wavelength - low) / (high - low);
        let divisor = match wavelength {
            short if short < original / high => 1.0,
            long if long > original / low => factor,
            _ => 1.0 / ((1.0 - smooth) / factor + smooth),
        };
        divisor as f32
    });
    (vec![head_dim / 2], divisors.collect())
}

/// A GGUF of Gemma 3 leaves some of the config out: that every sixth layer is global, and by what
/// queries are scaled.
#[test]
fn a_gguf_of_gemma_is_what_its_folder_is() {
    let tiny = Tiny::load("gemma3");
    let mut changed = config(&tiny);
    changed["layer_types"] = serde_json::json!(vec!["sliding_attention"; 3]);
    changed["query_pre_attn_scalar"] = changed["head_dim"].clone();
    std::fs::write(tiny.folder().join("config.json"), changed.to_string()).unwrap();
    let path = tiny.folder().join("model.gguf");
    write_gguf(&path, "gemma3", &changed, &read(&tiny), false);
    let expected = generate(tiny.folder(), &tiny.prompt, 1);
    assert_ne!(expected, tiny.tokens, "the changes are meant to matter");
    assert_eq!(generate(&path, &tiny.prompt, 1), expected);
}

/// Two files and an index, in place of one file.
#[test]
fn shards_are_one_checkpoint() {
    let tiny = Tiny::load("qwen3");
    let tensors = read(&tiny);
    std::fs::remove_file(tiny.folder().join("model.safetensors")).unwrap();
    let mut weight_map = serde_json::Map::new();
    for shard in 0..2 {
        let file = format!("model-0000{}-of-00002.safetensors", shard + 1);
        let part: Vec<_> = tensors.iter().skip(shard).step_by(2).collect();
        weight_map.extend(part.iter().map(|(name, _)| ((*name).clone(), file.clone().into())));
        write_f32(&tiny.folder().join(file), part);
    }
    // What no index names is not read.
    std::fs::write(tiny.folder().join("stray.safetensors"), "no weights").unwrap();
    let index = serde_json::json!({"metadata": {}, "weight_map": weight_map});
    std::fs::write(tiny.folder().join("model.safetensors.index.json"), index.to_string()).unwrap();
    for ranks in [1, 2] {
        assert_eq!(generate(tiny.folder(), &tiny.prompt, ranks), tiny.tokens, "{ranks} ranks");
    }
}

/// Writes f32 safetensors over the model's.
fn replace(tiny: &Tiny, tensors: &Tensors) {
    write_f32(&tiny.folder().join("model.safetensors"), tensors);
}

fn write_f32<'a>(path: &Path, tensors: impl IntoIterator<Item = (&'a String, &'a Stored)>) {
    let views = tensors.into_iter().map(|(name, (shape, values))| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values));
        (name.as_str(), view.unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

#[test]
fn quantized_rows_and_columns_split_over_ranks() {
    let tiny = Tiny::load("llama-linear");
    let path = tiny.folder().join("model.gguf");
    let mut tensors = read(&tiny);
    write_gguf(&path, "llama", &config(&tiny), &tensors, true);
    let quantized = generate(&path, &tiny.prompt, 1);
    for (shape, values) in tensors.values_mut().filter(|(shape, _)| shape.len() > 1) {
        *values = q8_0_back(&q8_0(values));
        assert_eq!(values.len(), shape.iter().product::<usize>());
    }
    replace(&tiny, &tensors);
    assert_eq!(quantized, generate(tiny.folder(), &tiny.prompt, 1));
    // An inner size of 96 is three blocks: one for the first rank and two for the second, which
    // leaves nothing for a fourth.
    assert_eq!(quantized, generate(&path, &tiny.prompt, 2));
    let ranks = reference::group(4).into_iter().map(|(b, c)| (b as Arc<dyn Backend>, c)).collect();
    let checkpoint = Arc::new(Checkpoint::open(&path).unwrap());
    let error = LocalEngine::new(checkpoint, &EngineOptions::default(), ranks).err().unwrap();
    let error = format!("{error:#}");
    assert!(error.contains("--tp 4") && error.contains("blocks of 32"), "{error}");
}

/// How FP8 values are scaled.
#[derive(Clone, Copy, Debug)]
enum Scaling {
    Blocks,
    Rows,
    Tensor,
}

impl Scaling {
    /// The name's end, the rows and columns that share a scale, and the scales' shape.
    fn of(self, shape: &[usize]) -> (&'static str, [usize; 2], Vec<usize>) {
        match self {
            Scaling::Blocks => {
                ("weight_scale_inv", [16, 16], vec![shape[0].div_ceil(16), shape[1].div_ceil(16)])
            }
            Scaling::Rows => ("weight_scale", [1, shape[1]], vec![shape[0], 1]),
            Scaling::Tensor => ("weight_scale", [shape[0], shape[1]], vec![]),
        }
    }
}

/// A float8 near `value`, from 0.5 to 1.875 in magnitude: its byte, and what it is.
fn fp8(value: f32) -> (u8, f32) {
    let magnitude = (value.abs() * 32.0) as u8 & 15;
    let sign = if value < 0.0 { 0x80 } else { 0 };
    let base = if magnitude < 8 { 0.5 } else { 1.0 };
    (0x30 | magnitude | sign, f32::from(8 + (magnitude & 7)) / 8.0 * base * value.signum())
}

/// Stores the model's projections in FP8, and returns the model that they mean.
fn store_in_fp8(tiny: &Tiny, scaling: Scaling) -> Tensors {
    let mut plain = read(tiny);
    let mut stored: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, (shape, values)) in &mut plain {
        if !name.contains("_proj") {
            let bytes = bytemuck::cast_slice(values).to_vec();
            stored.push((name.clone(), Dtype::F32, shape.clone(), bytes));
            continue;
        }
        let (scale_name, block, scale_shape) = scaling.of(shape);
        let across = shape[1].div_ceil(block[1]);
        let count = scale_shape.iter().product::<usize>();
        let scales: Vec<f32> = (0..count).map(|i| 0.25 + 0.01 * (i % 30) as f32).collect();
        let mut bytes = Vec::new();
        for (i, value) in values.iter_mut().enumerate() {
            let (byte, float) = fp8(*value);
            bytes.push(byte);
            let at = i / shape[1] / block[0] * across + i % shape[1] / block[1];
            *value = float * scales[at];
        }
        let scale_name = name.replace("weight", scale_name);
        let scale_bytes = bytemuck::cast_slice(&scales).to_vec();
        stored.push((name.clone(), Dtype::F8_E4M3, shape.clone(), bytes));
        stored.push((scale_name, Dtype::F32, scale_shape, scale_bytes));
    }
    let views = stored.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let path = tiny.folder().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    plain
}

#[test]
fn fp8_is_what_its_values_and_scales_say() {
    for scaling in [Scaling::Blocks, Scaling::Rows, Scaling::Tensor] {
        let tiny = Tiny::load("llama-linear");
        let mut changed = config(&tiny);
        changed["quantization_config"] = serde_json::json!({"quant_method": "fp8"});
        if matches!(scaling, Scaling::Blocks) {
            changed["quantization_config"]["weight_block_size"] = serde_json::json!([16, 16]);
        }
        std::fs::write(tiny.folder().join("config.json"), changed.to_string()).unwrap();
        let plain = store_in_fp8(&tiny, scaling);
        let fp8 = [1, 2].map(|ranks| generate(tiny.folder(), &tiny.prompt, ranks));
        replace(&tiny, &plain);
        let expected = generate(tiny.folder(), &tiny.prompt, 1);
        assert_eq!(fp8, [expected.clone(), expected], "{scaling:?}");
    }
}
