//! Checkpoints of every kind, whole and hostile.

#[expect(dead_code, reason = "the stored logits are for other tests")]
mod tiny;

use std::path::{Path, PathBuf};

use minisgl_engine::{Architecture, Checkpoint, GgufValue, ModelConfig, RopeScaling};
use minisgl_tensor::Activation;
use proptest::prelude::*;
use serde_json::{Value, json};
use tiny::temporary_folder;

/// Writes GGUF files, wrong ones too.
struct GgufFile {
    bytes: Vec<u8>,
}

impl GgufFile {
    fn new(version: u32, tensors: u64, metadata: u64) -> Self {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(metadata.to_le_bytes());
        Self { bytes }
    }

    fn string(mut self, text: &str) -> Self {
        self.bytes.extend((text.len() as u64).to_le_bytes());
        self.bytes.extend(text.as_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn meta_u32(self, key: &str, value: u32) -> Self {
        self.string(key).u32(4).u32(value)
    }

    fn meta_string(self, key: &str, value: &str) -> Self {
        self.string(key).u32(8).string(value)
    }

    fn tensor(self, name: &str, shape: &[u64], kind: u32, offset: u64) -> Self {
        let mut file = self.string(name).u32(shape.len() as u32);
        for size in shape {
            file = file.u64(*size);
        }
        file.u32(kind).u64(offset)
    }

    fn data(mut self, bytes: usize) -> Vec<u8> {
        self.bytes.resize(self.bytes.len().next_multiple_of(32), 0);
        self.bytes.extend(vec![0; bytes]);
        self.bytes
    }
}

/// A llama of one layer's metadata (8 entries), and then `tensors` tensors.
fn llama(tensors: u64) -> GgufFile {
    GgufFile::new(3, tensors, 8)
        .meta_string("general.architecture", "llama")
        .meta_u32("llama.embedding_length", 64)
        .meta_u32("llama.block_count", 1)
        .meta_u32("llama.feed_forward_length", 32)
        .meta_u32("llama.attention.head_count", 4)
        .meta_u32("llama.attention.head_count_kv", 2)
        .meta_u32("llama.context_length", 128)
        .meta_u32("llama.vocab_size", 10)
}

fn open_bytes(bytes: &[u8]) -> Result<Checkpoint, String> {
    let folder = temporary_folder();
    let path = folder.join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let opened = Checkpoint::open(&path).map_err(|error| format!("{error:#}"));
    std::fs::remove_dir_all(folder).unwrap();
    opened
}

fn refused(opened: Result<Checkpoint, String>, parts: &[&str]) {
    let error = opened.err().expect("refused");
    for part in parts {
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

#[test]
fn a_gguf_opens() {
    let file = llama(1).tensor("token_embd.weight", &[64, 10], 8, 0).data(10 * 64 / 32 * 34);
    let checkpoint = open_bytes(&file).unwrap();
    let config = checkpoint.config();
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!((config.head_dim, config.vocab_size, config.kv_heads), (16, 10, 2));
    assert!(config.tie_embeddings);
    let tensors: Vec<_> = checkpoint.tensors().collect();
    assert_eq!(tensors[0].name, "model.embed_tokens.weight");
    assert_eq!(tensors[0].shape, [10, 64]);
    let value = checkpoint.gguf().unwrap().get("llama.block_count");
    assert_eq!(value, Some(&GgufValue::Int(1)));
}

#[test]
fn hostile_gguf_files_are_refused_with_a_reason() {
    let huge = u64::MAX / 2;
    let embedding = |shape: &[u64], kind: u32, offset: u64| {
        llama(1).tensor("token_embd.weight", shape, kind, offset).data(4096)
    };
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (b"".to_vec(), &["model.gguf"]),
        (b"GG".to_vec(), &["past the end"]),
        (b"PK\x03\x04 what else".to_vec(), &["not a GGUF file"]),
        (GgufFile::new(1, 0, 0).bytes, &["version 1"]),
        (GgufFile::new(3 << 24, 0, 0).bytes, &["version"]),
        (GgufFile::new(3, 0, huge).bytes, &["metadata key 0", "past the end"]),
        (GgufFile::new(3, 0, 1).u64(huge).bytes, &["past the end"]),
        (GgufFile::new(3, 0, 1).string("k").u32(77).bytes, &["\"k\"", "type 77"]),
        (GgufFile::new(3, 0, 1).string("k").u32(9).u32(8).u64(huge).bytes, &["\"k\"", "array"]),
        (GgufFile::new(3, 0, 1).string("k").u32(9).u32(9).u64(1).bytes, &["nested"]),
        (GgufFile::new(3, 0, 2).meta_u32("k", 1).meta_u32("k", 1).bytes, &["\"k\"", "twice"]),
        (GgufFile::new(3, 0, 1).meta_u32("general.alignment", 0).bytes, &["alignment"]),
        (GgufFile::new(3, 0, 1).meta_u32("general.alignment", 3).bytes, &["alignment"]),
        (GgufFile::new(3, 0, 0).bytes, &["general.architecture"]),
        (GgufFile::new(3, 0, 1).meta_u32("split.count", 3).bytes, &["one of 3 parts"]),
        (
            GgufFile::new(3, 0, 1).meta_string("general.architecture", "mamba").bytes,
            &["\"mamba\"", "qwen3moe"],
        ),
        (
            GgufFile::new(3, 0, 1).meta_string("general.architecture", "llama").bytes,
            &["llama.embedding_length"],
        ),
        (llama(huge).bytes, &["tensor 0"]),
        (embedding(&[64, 10], 10, 0), &["token_embd.weight", "GGML type 10"]),
        (embedding(&[63, 10], 8, 0), &["token_embd.weight", "shape"]),
        (embedding(&[1 << 40, 1 << 40], 0, 0), &["token_embd.weight", "shape"]),
        (embedding(&[64, 1 << 30], 0, 0), &["token_embd.weight", "past the end"]),
        (embedding(&[64, 10], 0, u64::MAX - 31), &["token_embd.weight", "past the end"]),
        (embedding(&[64, 10], 0, 7), &["token_embd.weight", "not aligned"]),
        (
            GgufFile::new(3, 0, 7)
                .meta_string("general.architecture", "llama")
                .meta_u32("llama.embedding_length", 64)
                .meta_u32("llama.block_count", 1)
                .meta_u32("llama.attention.head_count", 4)
                .meta_u32("llama.context_length", 128)
                .meta_u32("llama.rope.dimension_count", 8)
                .meta_u32("llama.attention.key_length", 16)
                .bytes,
            &["llama.rope.dimension_count", "part"],
        ),
        (embedding(&[], 0, 0), &["token_embd.weight", "0 dimensions"]),
        (embedding(&[1; 9], 0, 0), &["token_embd.weight", "9 dimensions"]),
        (
            llama(2)
                .tensor("output.weight", &[32], 0, 0)
                .tensor("output.weight", &[32], 0, 128)
                .data(256),
            &["output.weight", "twice"],
        ),
        (
            llama(1).tensor("blk.0.attn_q.weight", &[64, 63], 0, 0).data(64 * 64 * 4),
            &["blk.0.attn_q.weight", "whole heads"],
        ),
    ];
    for (bytes, parts) in cases {
        refused(open_bytes(&bytes), parts);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn mutated_gguf_files_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
        truncate in any::<bool>(),
    ) {
        let mut file = llama(2)
            .tensor("token_embd.weight", &[64, 10], 0, 0)
            .tensor("blk.0.attn_q.weight", &[64, 64], 8, 2560)
            .data(2560 + 64 * 68);
        for (at, byte) in changes {
            let at = at.index(file.len().min(700));
            file[at] = byte;
        }
        if truncate {
            file.truncate(cut.index(file.len()));
        }
        let _ = open_bytes(&file);
    }

    #[test]
    fn mutated_safetensors_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut file = safetensors_file();
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        let _ = open_folder(&base_config(), &[("model.safetensors", &file)]);
    }
}

fn safetensors_file() -> Vec<u8> {
    let header = json!({
        "model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "lm_head.weight": {"dtype": "F8_E4M3", "shape": [4, 4], "data_offsets": [16, 32]},
    })
    .to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend([0; 32]);
    file
}

fn open_folder(config: &Value, files: &[(&str, &[u8])]) -> Result<Checkpoint, String> {
    let folder = temporary_folder();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
    let opened = Checkpoint::open(&folder).map_err(|error| format!("{error:#}"));
    std::fs::remove_dir_all(folder).unwrap();
    opened
}

fn base_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 120,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "eos_token_id": [2, 7],
    })
}

fn with(changes: Value) -> Value {
    let mut config = base_config();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

#[test]
fn hostile_folders_are_refused_with_a_reason() {
    let config = base_config();
    let file = safetensors_file();
    refused(open_folder(&config, &[("model.safetensors", &file[..9])]), &["model.safetensors"]);
    let cut = &file[..file.len() - 1];
    refused(open_folder(&config, &[("model.safetensors", cut)]), &["model.safetensors"]);
    let mut long = file.clone();
    long[7] = 0x7f;
    refused(open_folder(&config, &[("model.safetensors", &long)]), &["model.safetensors"]);
    let index = br#"{"weight_map": {"a": "../../etc/passwd"}}"#;
    refused(
        open_folder(&config, &[("model.safetensors.index.json", index)]),
        &["index.json", "../../etc/passwd"],
    );
    let index = br#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#;
    refused(
        open_folder(&config, &[("model.safetensors.index.json", index)]),
        &["model-00001-of-00002.safetensors"],
    );
    let index = br#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
    let files: [(&str, &[u8]); 3] = [
        ("model.safetensors.index.json", index),
        ("one.safetensors", &file),
        ("two.safetensors", &file),
    ];
    refused(open_folder(&config, &files), &["two.safetensors", "twice"]);
    let missing = Path::new("/no/such/model");
    assert!(Checkpoint::open(missing).err().unwrap().to_string().contains("/no/such/model"));
}

#[test]
fn absurd_configs_name_the_field() {
    let cases = [
        (json!({"architectures": ["MambaForCausalLM"]}), "MambaForCausalLM"),
        (json!({"architectures": null}), "architectures"),
        (json!({"hidden_size": -4}), "hidden_size"),
        (json!({"hidden_size": null}), "hidden_size"),
        (json!({"num_hidden_layers": 0}), "num_hidden_layers"),
        (json!({"num_hidden_layers": 1e9 as u64}), "layers"),
        (json!({"num_key_value_heads": 3}), "3 key and value heads"),
        (json!({"head_dim": 15}), "head_dim"),
        (json!({"hidden_act": "relu"}), "hidden_act"),
        (json!({"rope_theta": 0}), "rope_theta"),
        (json!({"rope_theta": "1e6"}), "rope_theta"),
        (json!({"rms_norm_eps": "small"}), "rms_norm_eps"),
        (json!({"tie_word_embeddings": "no"}), "tie_word_embeddings"),
        (json!({"mlp_bias": true}), "mlp_bias"),
        (json!({"attention_bias": true}), "attention_bias"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "partial_rotary_factor"),
        (json!({"layer_types": ["full_attention"]}), "layer_types"),
        (json!({"layer_types": ["full_attention", "chunked_attention"]}), "chunked_attention"),
        (json!({"quantization_config": {"quant_method": "gptq"}}), "gptq"),
        (json!({"quantization_config": {"weight_block_size": [0]}}), "weight_block_size"),
        (json!({"rope_scaling": {"type": "longrope"}}), "longrope"),
        (json!({"rope_scaling": {"type": "linear"}}), "factor"),
    ];
    for (changes, part) in cases {
        let error = format!("{:#}", ModelConfig::from_json(&with(changes)).err().unwrap());
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

#[test]
fn old_and_new_spellings_mean_the_same() {
    let read = |changes: Value| ModelConfig::from_json(&with(changes)).unwrap();
    let linear = RopeScaling::Linear { factor: 2.0 };
    for spelling in [
        json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        json!({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        json!({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}),
    ] {
        let config = read(spelling);
        assert_eq!((config.rope.base, &config.rope.scaling), (5e5, &linear));
    }
    let nested = ModelConfig::from_json(&json!({
        "architectures": ["Mistral3ForConditionalGeneration"], "text_config": base_config(),
    }))
    .unwrap();
    assert_eq!(nested.architecture, Architecture::Mistral3);
    assert_eq!(nested.hidden_size, 64);
    let gemma = read(json!({"architectures": ["Gemma3ForCausalLM"], "head_dim": 256,
        "sliding_window": 512, "query_pre_attn_scalar": 64, "num_hidden_layers": 7}));
    assert_eq!(gemma.activation, Activation::GeluTanh);
    assert_eq!(gemma.attention_scale, 0.125);
    let windows: Vec<bool> = (0..7).map(|layer| gemma.window(layer).is_some()).collect();
    assert_eq!(windows, [true, true, true, true, true, false, true]);
    let qwen = read(json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096,
        "use_sliding_window": false}));
    assert!(qwen.qkv_bias && qwen.window(0).is_none());
    let unsaid = read(json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096,
        "max_window_layers": 0}));
    assert!(unsaid.window(0).is_none());
    let ministral = read(json!({"architectures": ["Mistral3ForConditionalGeneration"],
        "rope_parameters": {"rope_type": "yarn", "factor": 16.0, "rope_theta": 1e6,
            "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1}}));
    assert_eq!(ministral.max_positions, 64);
}

#[test]
fn end_of_sequence_ids_come_from_the_generation_config_first() {
    let config = base_config();
    assert_eq!(open_folder(&config, &[]).unwrap().eos_ids(), [2, 7]);
    let generation: (&str, &[u8]) = ("generation_config.json", br#"{"eos_token_id": [5, 6]}"#);
    assert_eq!(open_folder(&config, &[generation]).unwrap().eos_ids(), [5, 6]);
    let generation: (&str, &[u8]) = ("generation_config.json", br#"{"eos_token_id": 9}"#);
    assert_eq!(open_folder(&config, &[generation]).unwrap().eos_ids(), [9]);
}

#[test]
fn tensors_of_other_parts_are_left_out_and_counted() {
    let tiny = tiny::Tiny::load("mistral3");
    let checkpoint = Checkpoint::open(tiny.folder()).unwrap();
    assert!(checkpoint.left_out() > 5, "{}", checkpoint.left_out());
    let names: Vec<String> = checkpoint.tensors().map(|tensor| tensor.name).collect();
    assert!(names.iter().all(|name| name.starts_with("model.") || name == "lm_head.weight"));
}

#[test]
fn files_beside_the_config_are_found() {
    let folder: PathBuf = temporary_folder();
    std::fs::write(folder.join("config.json"), base_config().to_string()).unwrap();
    std::fs::write(folder.join("tokenizer.json"), "{}").unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    assert!(checkpoint.is_empty());
    assert_eq!(checkpoint.sibling("tokenizer.json"), Some(folder.join("tokenizer.json")));
    assert_eq!(checkpoint.sibling("chat_template.jinja"), None);
    std::fs::remove_dir_all(folder).unwrap();
}
