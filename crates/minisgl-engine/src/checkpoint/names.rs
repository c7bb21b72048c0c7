//! One name for each tensor, the one that Hugging Face gives it in a text-only model.

use crate::models::Architecture;

/// A multimodal checkpoint's text part under its text-only name; `None` for the rest of it.
pub fn from_hugging_face(name: &str) -> Option<String> {
    let other_parts = ["vision_tower.", "vision_model.", "multi_modal_projector.", "visual."];
    let tail = name.strip_prefix("model.").unwrap_or(name);
    if other_parts.iter().any(|part| tail.starts_with(part)) {
        return None;
    }
    if let Some(inner) = name.strip_prefix("model.language_model.") {
        return Some(format!("model.{inner}"));
    }
    Some(name.strip_prefix("language_model.").unwrap_or(name).to_owned())
}

/// A GGUF tensor's name by llama.cpp's table; `None` for what the text model does not need.
pub fn from_gguf(name: &str, architecture: Architecture) -> Option<String> {
    if let Some(rest) = name.strip_prefix("blk.") {
        let (layer, rest) = rest.split_once('.')?;
        let (part, suffix) = rest.rsplit_once('.')?;
        let layer: usize = layer.parse().ok()?;
        let part = layer_part(part, architecture)?;
        return Some(format!("model.layers.{layer}.{part}.{suffix}"));
    }
    Some(
        match name {
            "token_embd.weight" => "model.embed_tokens.weight",
            "output_norm.weight" => "model.norm.weight",
            "output.weight" => "lm_head.weight",
            "rope_freqs.weight" => "rope_freqs.weight",
            _ => return None,
        }
        .to_owned(),
    )
}

fn layer_part(part: &str, architecture: Architecture) -> Option<&'static str> {
    let sandwich = architecture == Architecture::Gemma3;
    Some(match part {
        "attn_norm" => "input_layernorm",
        "ffn_norm" if sandwich => "pre_feedforward_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "post_attention_norm" => "post_attention_layernorm",
        "post_ffw_norm" => "post_feedforward_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        "ffn_gate_inp" => "mlp.gate",
        "ffn_gate_exps" => "mlp.experts.gate_proj",
        "ffn_up_exps" => "mlp.experts.up_proj",
        "ffn_down_exps" => "mlp.experts.down_proj",
        _ => return None,
    })
}
