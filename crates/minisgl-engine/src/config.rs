//! What a model is: read from `config.json` or from GGUF metadata.

use anyhow::{Context, Result, bail, ensure};
use minisgl_tensor::Activation;
use serde_json::Value;

use crate::checkpoint::gguf::GgufMetadata;
use crate::models::Architecture;
use crate::rope::{RopeConfig, RopeScaling};

/// A decoder-only transformer's sizes and habits.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "fields that say nothing carry config.json's own names")]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_layers: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate_size: usize,
    pub norm_eps: f32,
    /// Tokens that the model was trained to handle in one sequence.
    pub max_positions: usize,
    pub rope: RopeConfig,
    /// Rotation of sliding layers, where it differs (Gemma 3).
    pub local_rope: Option<RopeConfig>,
    pub activation: Activation,
    /// The head is the embedding.
    pub tie_embeddings: bool,
    pub qkv_bias: bool,
    pub moe: Option<MoeConfig>,
    /// How many tokens a sliding layer sees, the current one included.
    pub sliding_window: Option<usize>,
    /// Which layers slide; empty if all do (where there is a window).
    pub sliding_layers: Vec<bool>,
    /// Scores are multiplied with this.
    pub attention_scale: f32,
    pub attention_soft_cap: Option<f32>,
    pub logit_soft_cap: Option<f32>,
    /// Norms multiply with `1 + weight`.
    pub norm_plus_one: bool,
    /// Rows and columns that share an FP8 scale.
    pub fp8_block: [usize; 2],
}

/// A mixture of experts.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "fields carry config.json's own names")]
pub struct MoeConfig {
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    pub moe_intermediate_size: usize,
    pub norm_topk_prob: bool,
    /// Layer i has experts, and not one dense MLP.
    pub sparse_layers: Vec<bool>,
}

impl ModelConfig {
    /// Reads a parsed `config.json`, in its old and its new spellings.
    ///
    /// # Errors
    /// Names the architecture that is not supported, or the field that is missing or absurd.
    pub fn from_json(config: &Value) -> Result<Self> {
        let named = config["architectures"][0]
            .as_str()
            .or(config["text_config"]["architectures"][0].as_str());
        let architecture = Architecture::from_name(
            named.context("config.json names no architecture (field \"architectures\")")?,
        )?;
        let fields = Fields { inner: config.get("text_config").unwrap_or(config), outer: config };
        let gemma = architecture == Architecture::Gemma3;
        refuse_what_would_be_wrong(&fields, architecture)?;
        let hidden_size = fields.size("hidden_size")?;
        let q_heads = fields.size("num_attention_heads")?;
        let num_layers = fields.size("num_hidden_layers")?;
        let head_dim = match fields.maybe_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if gemma => 256,
            None => hidden_size / q_heads,
        };
        let max_positions = fields.size("max_position_embeddings")?;
        let (rope, local_rope) = json_ropes(&fields, architecture, head_dim, max_positions)?;
        let max_positions = unscaled_positions(&fields, max_positions);
        let (sliding_window, sliding_layers) = json_sliding(&fields, architecture, num_layers)?;
        let query_scalar = fields.float("query_pre_attn_scalar")?.unwrap_or(256.0);
        let config = Self {
            architecture,
            vocab_size: fields.size("vocab_size")?,
            hidden_size,
            num_layers,
            q_heads,
            kv_heads: fields.maybe_size("num_key_value_heads")?.unwrap_or(q_heads),
            head_dim,
            intermediate_size: fields.size("intermediate_size")?,
            norm_eps: fields.float("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            max_positions,
            rope,
            local_rope,
            activation: json_activation(&fields, gemma)?,
            tie_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(gemma),
            qkv_bias: architecture == Architecture::Qwen2,
            moe: match architecture {
                Architecture::Qwen3Moe => Some(json_moe(&fields, num_layers)?),
                _ => None,
            },
            sliding_window,
            sliding_layers,
            attention_scale: if gemma { query_scalar } else { head_dim as f64 }.powf(-0.5) as f32,
            attention_soft_cap: fields.float("attn_logit_softcapping")?.map(|cap| cap as f32),
            logit_soft_cap: fields.float("final_logit_softcapping")?.map(|cap| cap as f32),
            norm_plus_one: gemma,
            fp8_block: json_fp8_block(config)?,
        };
        config.check()?;
        Ok(config)
    }

    /// Reads GGUF metadata. What only the tensors tell (tied head, biases) is set by
    /// `Checkpoint::open`.
    pub fn from_gguf(metadata: &GgufMetadata) -> Result<Self> {
        let name = metadata
            .string("general.architecture")
            .context("the file names no architecture (metadata general.architecture)")?;
        let architecture = Architecture::from_gguf_name(name)?;
        let gemma = architecture == Architecture::Gemma3;
        let fields = GgufFields { metadata, prefix: name };
        let hidden_size = fields.size("embedding_length")?;
        let q_heads = fields.size("attention.head_count")?;
        let num_layers = fields.size("block_count")?;
        let max_positions = fields.size("context_length")?;
        let head_dim = match fields.maybe_size("attention.key_length") {
            Some(head_dim) => head_dim,
            None => fields.maybe_size("rope.dimension_count").unwrap_or(hidden_size / q_heads),
        };
        let rotated = fields.maybe_size("rope.dimension_count").unwrap_or(head_dim);
        ensure!(
            rotated == head_dim,
            "{name}.rope.dimension_count is {rotated} and a head has {head_dim} elements: rotating \
             a part of them is not supported"
        );
        let (rope, local_rope) = fields.ropes(architecture, head_dim, max_positions)?;
        // The file does not carry it. Gemma 3 27B, the one with 62 layers, divides otherwise.
        let query_scalar = if gemma && num_layers == 62 { hidden_size / q_heads } else { head_dim };
        let tokens = metadata.strings("tokenizer.ggml.tokens").map_or(0, <[String]>::len);
        let moe = match architecture {
            Architecture::Qwen3Moe => Some(MoeConfig {
                num_experts: fields.size("expert_count")?,
                num_experts_per_tok: fields.size("expert_used_count")?,
                moe_intermediate_size: fields.size("expert_feed_forward_length")?,
                norm_topk_prob: true,
                sparse_layers: vec![true; num_layers.min(LAYERS_MAX)],
            }),
            _ => None,
        };
        let config = Self {
            architecture,
            vocab_size: fields.maybe_size("vocab_size").unwrap_or(tokens),
            hidden_size,
            num_layers,
            q_heads,
            kv_heads: fields.maybe_size("attention.head_count_kv").unwrap_or(q_heads),
            head_dim,
            intermediate_size: fields.maybe_size("feed_forward_length").unwrap_or(hidden_size),
            norm_eps: metadata
                .float(&format!("{name}.attention.layer_norm_rms_epsilon"))
                .unwrap_or(1e-6) as f32,
            max_positions,
            rope,
            local_rope,
            activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
            tie_embeddings: true,
            qkv_bias: architecture == Architecture::Qwen2,
            moe,
            sliding_window: fields.maybe_size("attention.sliding_window"),
            sliding_layers: if gemma {
                every_nth_global(num_layers.min(LAYERS_MAX), 6)
            } else {
                Vec::new()
            },
            attention_scale: (query_scalar as f32).powf(-0.5),
            attention_soft_cap: None,
            logit_soft_cap: None,
            // The converter to GGUF adds the 1 to the weights.
            norm_plus_one: false,
            fp8_block: [128, 128],
        };
        config.check()?;
        Ok(config)
    }

    /// The window of layer `layer`, if it slides.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let slides = self.sliding_layers.get(layer).copied().unwrap_or(true);
        self.sliding_window.filter(|_| slides)
    }

    fn check(&self) -> Result<()> {
        let at_most = |field: &str, value: usize, most: usize| {
            ensure!((1..=most).contains(&value), "{field} is {value}: not in 1..={most}");
            Ok(())
        };
        at_most("the number of layers", self.num_layers, LAYERS_MAX)?;
        at_most("the hidden size", self.hidden_size, 1 << 20)?;
        at_most("the intermediate size", self.intermediate_size, 1 << 22)?;
        at_most("the number of query heads", self.q_heads, 1 << 14)?;
        at_most("the number of key and value heads", self.kv_heads, self.q_heads)?;
        at_most("head_dim", self.head_dim, 1024)?;
        at_most("the context length", self.max_positions, 1 << 28)?;
        at_most("vocab_size", self.vocab_size.max(1), 1 << 26)?;
        ensure!(self.head_dim.is_multiple_of(2), "head_dim is {}: odd", self.head_dim);
        ensure!(
            self.q_heads.is_multiple_of(self.kv_heads),
            "{} query heads cannot share {} key and value heads evenly",
            self.q_heads,
            self.kv_heads
        );
        if let Some(moe) = &self.moe {
            at_most("the number of experts", moe.num_experts, 1 << 14)?;
            at_most("the experts of a token", moe.num_experts_per_tok, moe.num_experts)?;
            at_most("moe_intermediate_size", moe.moe_intermediate_size, 1 << 22)?;
        }
        ensure!(
            self.norm_eps.is_finite() && self.norm_eps >= 0.0,
            "rms_norm_eps is {}",
            self.norm_eps
        );
        self.rope.check()
    }
}

const LAYERS_MAX: usize = 4096;

/// A text model's fields, which stand in `text_config` or at the top.
struct Fields<'a> {
    inner: &'a Value,
    outer: &'a Value,
}

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        let set = |config: &'a Value| config.get(name).filter(|value| !value.is_null());
        set(self.inner).or_else(|| set(self.outer))
    }

    fn size(&self, name: &str) -> Result<usize> {
        self.maybe_size(name)?.with_context(|| format!("field {name:?} is missing"))
    }

    fn maybe_size(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        let size = size.filter(|size| *size > 0);
        Ok(Some(
            size.with_context(|| format!("field {name:?} is {value}, not a positive integer"))?,
        ))
    }

    fn float(&self, name: &str) -> Result<Option<f64>> {
        let number = |value: &Value| {
            value.as_f64().with_context(|| format!("field {name:?} is {value}, not a number"))
        };
        self.get(name).map(number).transpose()
    }

    fn bool(&self, name: &str) -> Result<Option<bool>> {
        let truth = |value: &Value| {
            value.as_bool().with_context(|| format!("field {name:?} is {value}, not true or false"))
        };
        self.get(name).map(truth).transpose()
    }
}

/// Fields that ask for what no layer here does: the model would answer, and wrongly.
fn refuse_what_would_be_wrong(fields: &Fields<'_>, architecture: Architecture) -> Result<()> {
    let refuse = |name: &str| match fields.bool(name)? {
        Some(true) => bail!("field {name:?} is true, which is not supported"),
        _ => Ok(()),
    };
    refuse("mlp_bias")?;
    if architecture != Architecture::Qwen2 {
        // It would also put a bias on the output projection.
        refuse("attention_bias")?;
    }
    let rotated = |value: &Value| value.get("partial_rotary_factor").and_then(Value::as_f64);
    let inner = fields.get("rope_parameters").and_then(rotated);
    if let Some(share) = fields.float("partial_rotary_factor")?.or(inner) {
        ensure!(share == 1.0, "field \"partial_rotary_factor\" is {share}, which is not supported");
    }
    let method = fields.get("quantization_config").map(|config| &config["quant_method"]);
    match method.and_then(Value::as_str) {
        None | Some("fp8" | "compressed-tensors") => Ok(()),
        Some(other) => bail!("field \"quant_method\": {other:?} is not supported (fp8 is)"),
    }
}

/// Ministral 3 scales its queries up by steps, one for each length of its original context, which
/// no layer here does: only the first step, where the factor is 1, is served.
fn unscaled_positions(fields: &Fields<'_>, max_positions: usize) -> usize {
    let rope = fields.get("rope_parameters").or(fields.get("rope_scaling"));
    let number = |name: &str| rope.and_then(|rope| rope.get(name)).and_then(Value::as_f64);
    match (number("llama_4_scaling_beta"), number("original_max_position_embeddings")) {
        (Some(beta), Some(original)) if beta != 0.0 => max_positions.min(original as usize),
        _ => max_positions,
    }
}

fn json_activation(fields: &Fields<'_>, gemma: bool) -> Result<Activation> {
    let name = fields.get("hidden_activation").or(fields.get("hidden_act"));
    match name.and_then(Value::as_str) {
        None if gemma => Ok(Activation::GeluTanh),
        None | Some("silu") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some(other) => bail!("field \"hidden_act\": {other:?} is not supported"),
    }
}

fn json_fp8_block(config: &Value) -> Result<[usize; 2]> {
    let Some(block) = config["quantization_config"]["weight_block_size"].as_array() else {
        return Ok([128, 128]);
    };
    let side = |i: usize| block.get(i).and_then(Value::as_u64).filter(|side| *side > 0);
    match (side(0), side(1)) {
        (Some(rows), Some(cols)) => Ok([rows as usize, cols as usize]),
        _ => bail!("field \"weight_block_size\" is {block:?}, not two positive integers"),
    }
}

fn json_moe(fields: &Fields<'_>, num_layers: usize) -> Result<MoeConfig> {
    let step = fields.maybe_size("decoder_sparse_step")?.unwrap_or(1);
    let dense: Vec<usize> = fields
        .get("mlp_only_layers")
        .and_then(Value::as_array)
        .map(|layers| layers.iter().filter_map(|l| Some(l.as_u64()? as usize)).collect())
        .unwrap_or_default();
    Ok(MoeConfig {
        num_experts: match fields.maybe_size("num_experts")? {
            Some(count) => count,
            None => fields.size("num_local_experts")?,
        },
        num_experts_per_tok: fields.size("num_experts_per_tok")?,
        moe_intermediate_size: fields.size("moe_intermediate_size")?,
        norm_topk_prob: fields.bool("norm_topk_prob")?.unwrap_or(false),
        sparse_layers: (0..num_layers.min(LAYERS_MAX))
            .map(|layer| !dense.contains(&layer) && (layer + 1).is_multiple_of(step))
            .collect(),
    })
}

fn json_sliding(
    fields: &Fields<'_>,
    architecture: Architecture,
    num_layers: usize,
) -> Result<(Option<usize>, Vec<bool>)> {
    let num_layers = num_layers.min(LAYERS_MAX);
    let window = fields.maybe_size("sliding_window")?;
    // Qwen carries a window in its config and says beside it if it is used.
    use Architecture::{Qwen2, Qwen3, Qwen3Moe};
    let is_qwen = matches!(architecture, Qwen2 | Qwen3 | Qwen3Moe);
    let used = fields.bool("use_sliding_window")?.unwrap_or(!is_qwen);
    let window = window.filter(|_| used);
    if let Some(types) = fields.get("layer_types").and_then(Value::as_array) {
        ensure!(
            types.len() == num_layers,
            "field \"layer_types\" names {} layers of {num_layers}",
            types.len()
        );
        let slides = |kind: &Value| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => bail!("field \"layer_types\": {kind} is not supported"),
        };
        return Ok((window, types.iter().map(slides).collect::<Result<_>>()?));
    }
    let layers = match architecture {
        Architecture::Gemma3 => {
            let pattern = fields
                .maybe_size("sliding_window_pattern")?
                .or(fields.maybe_size("_sliding_window_pattern")?);
            every_nth_global(num_layers, pattern.unwrap_or(6))
        }
        Qwen2 | Qwen3 => {
            let first = fields.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28);
            (0..num_layers).map(|layer| layer as u64 >= first).collect()
        }
        _ => Vec::new(),
    };
    Ok((window, layers))
}

fn every_nth_global(num_layers: usize, n: usize) -> Vec<bool> {
    (0..num_layers).map(|layer| !(layer + 1).is_multiple_of(n)).collect()
}

fn json_ropes(
    fields: &Fields<'_>,
    architecture: Architecture,
    head_dim: usize,
    max_positions: usize,
) -> Result<(RopeConfig, Option<RopeConfig>)> {
    let gemma = architecture == Architecture::Gemma3;
    let base = fields.float("rope_theta")?;
    let rope = |parameters: Option<&Value>, default_base: f64| -> Result<RopeConfig> {
        let inner = parameters.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
        let scaling = match parameters {
            Some(parameters) => json_scaling(parameters, fields, max_positions)?,
            None => RopeScaling::None,
        };
        let base = inner.unwrap_or(default_base);
        Ok(RopeConfig { base, head_dim, scaling, frequency_divisors: Vec::new() })
    };
    let new = fields.get("rope_parameters");
    if let Some(by_kind) = new.filter(|new| new.get("full_attention").is_some()) {
        let global = rope(by_kind.get("full_attention"), base.unwrap_or(1e6))?;
        let local = rope(by_kind.get("sliding_attention"), 10_000.0)?;
        return Ok((global, Some(local)));
    }
    let default_base = base.unwrap_or(if gemma { 1e6 } else { 10_000.0 });
    let global = rope(new.or(fields.get("rope_scaling")), default_base)?;
    let local = match gemma {
        true => Some(rope(None, fields.float("rope_local_base_freq")?.unwrap_or(10_000.0))?),
        false => None,
    };
    Ok((global, local))
}

fn json_scaling(p: &Value, fields: &Fields<'_>, max_positions: usize) -> Result<RopeScaling> {
    let number = |name: &str| p.get(name).and_then(Value::as_f64);
    let needed = |name: &str| {
        number(name).with_context(|| format!("rope scaling: field {name:?} is missing"))
    };
    let original = number("original_max_position_embeddings")
        .or(fields.float("original_max_position_embeddings")?);
    let kind = p.get("rope_type").or(p.get("type")).and_then(Value::as_str).unwrap_or("default");
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: needed("factor")? },
        "dynamic" => RopeScaling::Dynamic {
            factor: needed("factor")?,
            original_max_positions: original.unwrap_or(max_positions as f64),
        },
        "llama3" => RopeScaling::Llama3 {
            factor: needed("factor")?,
            low_freq_factor: needed("low_freq_factor")?,
            high_freq_factor: needed("high_freq_factor")?,
            original_max_positions: needed("original_max_position_embeddings")?,
        },
        "yarn" => RopeScaling::Yarn {
            factor: needed("factor")?,
            original_max_positions: original.unwrap_or(max_positions as f64),
            beta_fast: number("beta_fast").unwrap_or(32.0),
            beta_slow: number("beta_slow").unwrap_or(1.0),
            attention_factor: number("attention_factor"),
            mscale: number("mscale").zip(number("mscale_all_dim")),
            truncate: p.get("truncate").and_then(Value::as_bool).unwrap_or(true),
        },
        other => {
            bail!("rope scaling {other:?} is not supported (linear, dynamic, llama3 and yarn are)")
        }
    })
}

/// Metadata under the architecture's own prefix.
struct GgufFields<'a> {
    metadata: &'a GgufMetadata,
    prefix: &'a str,
}

impl GgufFields<'_> {
    fn size(&self, name: &str) -> Result<usize> {
        self.maybe_size(name).with_context(|| {
            format!("metadata {}.{name} is missing or not a positive integer", self.prefix)
        })
    }

    fn maybe_size(&self, name: &str) -> Option<usize> {
        let size = self.metadata.unsigned(&format!("{}.{name}", self.prefix))?;
        usize::try_from(size).ok().filter(|size| *size > 0)
    }

    fn float(&self, name: &str) -> Option<f64> {
        self.metadata.float(&format!("{}.{name}", self.prefix))
    }

    fn ropes(
        &self,
        architecture: Architecture,
        head_dim: usize,
        max_positions: usize,
    ) -> Result<(RopeConfig, Option<RopeConfig>)> {
        let factor = self.float("rope.scaling.factor").unwrap_or(1.0);
        let kind = self.metadata.string(&format!("{}.rope.scaling.type", self.prefix));
        let scaling = match kind.unwrap_or("none") {
            "none" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor },
            "yarn" => RopeScaling::Yarn {
                factor,
                original_max_positions: self
                    .float("rope.scaling.original_context_length")
                    .unwrap_or(max_positions as f64),
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor: None,
                mscale: None,
                truncate: true,
            },
            other => bail!("rope scaling {other:?} is not supported (linear and yarn are)"),
        };
        let gemma = architecture == Architecture::Gemma3;
        let base = self.float("rope.freq_base").unwrap_or(if gemma { 1e6 } else { 10_000.0 });
        let rope =
            |base, scaling| RopeConfig { base, head_dim, scaling, frequency_divisors: Vec::new() };
        Ok((rope(base, scaling), gemma.then(|| rope(10_000.0, RopeScaling::None))))
    }
}
