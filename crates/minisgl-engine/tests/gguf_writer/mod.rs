//! Writes checkpoints as GGUF files, as llama.cpp's converter does.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

/// A shape and its values.
pub type Stored = (Vec<usize>, Vec<f32>);
pub type Tensors = BTreeMap<String, Stored>;

const GGUF_NAMES: [(&str, &str); 17] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
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

fn gguf_name(name: &str, architecture: &str) -> String {
    match name {
        "rope_freqs.weight" => return name.into(),
        "model.embed_tokens.weight" => return "token_embd.weight".into(),
        "model.norm.weight" => return "output_norm.weight".into(),
        "lm_head.weight" => return "output.weight".into(),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
    let (part, suffix) = rest.rsplit_once('.').unwrap();
    if architecture == "gemma3" && part == "post_attention_layernorm" {
        return format!("blk.{layer}.post_attention_norm.{suffix}");
    }
    let (_, gguf) = GGUF_NAMES.iter().find(|(hf, _)| *hf == part).unwrap();
    format!("blk.{layer}.{gguf}.{suffix}")
}

/// Experts stacked into one tensor, as GGUF has them.
pub fn merge_experts(tensors: Tensors) -> Tensors {
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

/// `quantize` writes matrices in Q8_0.
pub fn write_gguf(
    path: &Path,
    architecture: &str,
    config: &Value,
    tensors: &Tensors,
    quantize: bool,
) {
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
        ("attention.sliding_window", size("sliding_window")),
        ("rope.scaling.original_context_length", rope["original_max_position_embeddings"].as_u64()),
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
    let scaling = rope["rope_type"].as_str().filter(|kind| ["linear", "yarn"].contains(kind));
    let scaling = scaling.unwrap_or("none");
    string(&mut head, scaling);
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
        let name = gguf_name(name, architecture);
        let permuted =
            architecture == "llama" && (name.contains(".attn_q.") || name.contains(".attn_k."));
        let head_dim = config["head_dim"].as_u64().unwrap_or(16) as usize;
        let values = match permuted {
            true => interleave(values, shape[1], head_dim),
            // Gemma's norms multiply with one more than what its own files hold.
            false if architecture == "gemma3" && name.contains("norm") => {
                values.iter().map(|value| 1.0 + value).collect()
            }
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
pub fn q8_0(values: &[f32]) -> Vec<u8> {
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
