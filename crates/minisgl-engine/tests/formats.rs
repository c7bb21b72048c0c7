//! The same model from other files: GGUF and FP8 give what the plain safetensors give.

#[expect(dead_code, reason = "the switches for failures are for other tests")]
mod reference;
#[expect(dead_code, reason = "the stored logits are for other tests")]
mod tiny;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use minisgl_engine::{Checkpoint, EngineOptions, KvSize, LocalEngine};
use minisgl_scheduler::engine::Engine;
use minisgl_scheduler::plan::*;
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_tensor::{Alone, Backend, Precision};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;
use tiny::Tiny;

/// A shape and its values.
type Stored = (Vec<usize>, Vec<f32>);
type Tensors = BTreeMap<String, Stored>;

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
        let plan = StepPlan { step: 0, rows, page_updates, adjustments: None };
        let in_flight = engine.launch(Arc::new(plan)).unwrap();
        engine.wait(in_flight).unwrap().tokens[0].unwrap()
    };
    let mut tokens = vec![step(0, RowInput::Tokens(prompt.to_vec()), prompt.len())];
    while tokens.len() < 32 {
        tokens.push(step(prompt.len() + tokens.len() - 1, RowInput::Sampled, 1));
    }
    tokens
}

/// llama.cpp's converter moves rows of Q and K so that rotated pairs are neighbours.
fn interleave(values: &[f32], width: usize, head_dim: usize) -> Vec<f32> {
    let mut out = Vec::new();
    for head in values.chunks(head_dim * width) {
        for pair in 0..head_dim / 2 {
            out.extend_from_slice(&head[pair * width..][..width]);
            out.extend_from_slice(&head[(pair + head_dim / 2) * width..][..width]);
        }
    }
    out
}

/// ggml's Q8_0, of values that it holds exactly or not.
fn q8_0(values: &[f32]) -> Vec<u8> {
    values
        .chunks(32)
        .flat_map(|block| {
            let largest = block.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            let d = half::f16::from_f32(largest / 127.0);
            let q = |v: &f32| (v / d.to_f32()).round().clamp(-127.0, 127.0) as i8 as u8;
            d.to_le_bytes().into_iter().chain(block.iter().map(q)).collect::<Vec<_>>()
        })
        .collect()
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

const GGUF_NAMES: [(&str, &str); 15] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.experts.gate_proj", "ffn_gate_exps"),
    ("mlp.experts.up_proj", "ffn_up_exps"),
    ("mlp.experts.down_proj", "ffn_down_exps"),
];

fn gguf_name(name: &str) -> String {
    match name {
        "model.embed_tokens.weight" => return "token_embd.weight".into(),
        "model.norm.weight" => return "output_norm.weight".into(),
        "lm_head.weight" => return "output.weight".into(),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
    let (part, suffix) = rest.rsplit_once('.').unwrap();
    let (_, gguf) = GGUF_NAMES.iter().find(|(hf, _)| *hf == part).unwrap();
    format!("blk.{layer}.{gguf}.{suffix}")
}

/// Experts stacked into one tensor, as GGUF has them.
fn merge_experts(tensors: Tensors) -> Tensors {
    let mut merged = Tensors::new();
    let mut experts: BTreeMap<String, BTreeMap<usize, Stored>> = BTreeMap::new();
    for (name, tensor) in tensors {
        match name.split_once(".experts.") {
            None => drop(merged.insert(name, tensor)),
            Some((before, after)) => {
                let (expert, rest) = after.split_once('.').unwrap();
                let stack = experts.entry(format!("{before}.experts.{rest}")).or_default();
                stack.insert(expert.parse().unwrap(), tensor);
            }
        }
    }
    for (name, stack) in experts {
        let mut shape = vec![stack.len()];
        shape.extend(&stack[&0].0);
        merged.insert(name, (shape, stack.into_values().flat_map(|t| t.1).collect()));
    }
    merged
}

fn write_gguf(path: &Path, architecture: &str, config: &Value, tensors: &Tensors, quantize: bool) {
    let mut head: Vec<u8> = Vec::new();
    let string = |head: &mut Vec<u8>, text: &str| {
        head.extend((text.len() as u64).to_le_bytes());
        head.extend(text.as_bytes());
    };
    let size = |field: &str| config[field].as_u64();
    let rope = &config["rope_parameters"];
    let mut sizes = vec![
        ("embedding_length", size("hidden_size")),
        ("block_count", size("num_hidden_layers")),
        ("feed_forward_length", size("intermediate_size")),
        ("attention.head_count", size("num_attention_heads")),
        ("attention.head_count_kv", size("num_key_value_heads")),
        ("attention.key_length", size("head_dim")),
        ("context_length", size("max_position_embeddings")),
        ("expert_count", size("num_local_experts")),
        ("expert_used_count", size("num_experts_per_tok")),
        ("expert_feed_forward_length", size("moe_intermediate_size")),
    ];
    sizes.retain(|(_, value)| value.is_some());
    let floats = [
        ("attention.layer_norm_rms_epsilon", config["rms_norm_eps"].as_f64()),
        ("rope.freq_base", rope["rope_theta"].as_f64()),
        ("rope.scaling.factor", rope["factor"].as_f64()),
    ];
    let mut entries = 2;
    string(&mut head, "general.architecture");
    head.extend(8_u32.to_le_bytes());
    string(&mut head, architecture);
    string(&mut head, &format!("{architecture}.rope.scaling.type"));
    head.extend(8_u32.to_le_bytes());
    string(&mut head, if rope["factor"].is_null() { "none" } else { "linear" });
    for (name, value) in sizes {
        string(&mut head, &format!("{architecture}.{name}"));
        head.extend(10_u32.to_le_bytes());
        head.extend(value.unwrap().to_le_bytes());
        entries += 1;
    }
    for (name, value) in floats {
        let Some(value) = value else { continue };
        string(&mut head, &format!("{architecture}.{name}"));
        head.extend(6_u32.to_le_bytes());
        head.extend((value as f32).to_le_bytes());
        entries += 1;
    }
    let mut data: Vec<u8> = Vec::new();
    for (name, (shape, values)) in tensors {
        let name = gguf_name(name);
        let permuted =
            architecture == "llama" && (name.contains(".attn_q.") || name.contains(".attn_k."));
        let head_dim = config["head_dim"].as_u64().unwrap_or(16) as usize;
        let values = match permuted {
            true => interleave(values, shape[1], head_dim),
            false => values.clone(),
        };
        let quantized = quantize && shape.len() > 1;
        string(&mut head, &name);
        head.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|size| head.extend((*size as u64).to_le_bytes()));
        head.extend(if quantized { 8_u32 } else { 0 }.to_le_bytes());
        data.resize(data.len().next_multiple_of(32), 0);
        head.extend((data.len() as u64).to_le_bytes());
        match quantized {
            true => data.extend(q8_0(&values)),
            false => data.extend(bytemuck::cast_slice(&values)),
        }
    }
    let mut file = b"GGUF".to_vec();
    file.extend(3_u32.to_le_bytes());
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((entries as u64).to_le_bytes());
    file.extend(head);
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    std::fs::write(path, file).unwrap();
}

fn config(tiny: &Tiny) -> Value {
    serde_json::from_slice(&std::fs::read(tiny.folder().join("config.json")).unwrap()).unwrap()
}

#[test]
fn gguf_files_give_the_stored_tokens() {
    for (name, architecture) in [
        ("llama-linear", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("qwen3-moe", "qwen3moe"),
    ] {
        let tiny = Tiny::load(name);
        let path = tiny.folder().join("model.gguf");
        let tensors = merge_experts(read(&tiny));
        write_gguf(&path, architecture, &config(&tiny), &tensors, false);
        assert_eq!(generate(&path, &tiny.prompt, 1), tiny.tokens, "{name}");
    }
}

/// Writes f32 safetensors over the model's.
fn replace(tiny: &Tiny, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (shape, values))| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values));
        (name.as_str(), view.unwrap())
    });
    let path = tiny.folder().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
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

#[test]
fn fp8_with_block_scales_is_what_its_values_say() {
    let tiny = Tiny::load("llama-linear");
    let mut changed = config(&tiny);
    changed["quantization_config"] = serde_json::json!({"weight_block_size": [16, 16]});
    std::fs::write(tiny.folder().join("config.json"), changed.to_string()).unwrap();
    let mut plain = read(&tiny);
    let mut stored: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, (shape, values)) in &mut plain {
        if !name.contains("_proj") {
            let bytes = bytemuck::cast_slice(values).to_vec();
            stored.push((name.clone(), Dtype::F32, shape.clone(), bytes));
            continue;
        }
        let across = shape[1].div_ceil(16);
        let scales: Vec<f32> =
            (0..shape[0].div_ceil(16) * across).map(|i| 0.25 + 0.01 * i as f32).collect();
        // 0x30..0x3f are 0.5 to 1.875; the sign stays.
        let mut bytes = Vec::new();
        for (i, value) in values.iter_mut().enumerate() {
            let magnitude = (value.abs() * 32.0) as u8 & 15;
            bytes.push(0x30 | magnitude | if *value < 0.0 { 0x80 } else { 0 });
            let float = f32::from(8 + (magnitude & 7)) / 8.0
                * if magnitude < 8 { 0.5 } else { 1.0 }
                * value.signum();
            *value = float * scales[i / shape[1] / 16 * across + i % shape[1] / 16];
        }
        let scale_shape = vec![shape[0].div_ceil(16), across];
        let scale_bytes = bytemuck::cast_slice(&scales).to_vec();
        stored.push((name.clone(), Dtype::F8_E4M3, shape.clone(), bytes));
        stored.push((format!("{name}_scale_inv"), Dtype::F32, scale_shape, scale_bytes));
    }
    let views = stored.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let path = tiny.folder().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    let fp8 = [1, 2].map(|ranks| generate(tiny.folder(), &tiny.prompt, ranks));
    replace(&tiny, &plain);
    let expected = generate(tiny.folder(), &tiny.prompt, 1);
    assert_eq!(fp8, [expected.clone(), expected]);
}
