//! Tiny checkpoints: stored configs and references, weights by the formula that
//! `scripts/make_tiny_checkpoints.py` documents, written as safetensors into a temporary folder.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

pub struct Tiny {
    folder: PathBuf,
    pub vocab: usize,
    pub prompt: Vec<u32>,
    pub tokens: Vec<u32>,
    /// `[positions][vocab]`: log-softmax over prompt and tokens.
    pub logprobs: Vec<Vec<f32>>,
    /// How far the reference's own bfloat16 is from them: the largest difference over the largest
    /// magnitude.
    pub bf16_noise: f32,
}

impl Tiny {
    pub fn load(name: &str) -> Self {
        // Asked at run time as well: a test may run on a machine where it was not built.
        let crate_folder = std::env::var_os("CARGO_MANIFEST_DIR");
        let crate_folder = crate_folder.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let stored = Path::new(&crate_folder).join("tests/tiny").join(name);
        let expected = std::fs::read(stored.join("expected.json")).unwrap();
        let expected: Value = serde_json::from_slice(&expected).unwrap();
        let ids = |field: &str| -> Vec<u32> {
            expected[field].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
        };
        let vocab = 120;
        let logprobs: Vec<f32> = bytemuck::allocation::pod_collect_to_vec(&base64(
            expected["logprobs"].as_str().unwrap(),
        ));
        let folder = temporary_folder();
        std::fs::copy(stored.join("config.json"), folder.join("config.json")).unwrap();
        let embedding_scale = expected["embedding_scale"].as_f64().unwrap_or(2.0) as f32;
        write_weights(&folder.join("model.safetensors"), &expected["tensors"], embedding_scale);
        Self {
            folder,
            vocab,
            prompt: ids("prompt"),
            tokens: ids("tokens"),
            bf16_noise: expected["bf16_noise"].as_f64().unwrap() as f32,
            logprobs: logprobs.chunks(vocab).map(<[f32]>::to_vec).collect(),
        }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Stores the weights in bfloat16, each rounded to the nearest.
    pub fn round_to_bf16(&self) {
        let path = self.folder.join("model.safetensors");
        let file = std::fs::read(&path).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        let rounded: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
            .iter()
            .map(|(name, view)| {
                let values: Vec<f32> = bytemuck::allocation::pod_collect_to_vec(view.data());
                let round = |value: &f32| half::bf16::from_f32(*value).to_le_bytes();
                (name.to_owned(), view.shape().to_vec(), values.iter().flat_map(round).collect())
            })
            .collect();
        let views = rounded.iter().map(|(name, shape, data)| {
            let dtype = safetensors::Dtype::BF16;
            let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), data).unwrap();
            (name.as_str(), view)
        });
        safetensors::serialize_to_file(views, None, &path).unwrap();
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.folder).unwrap();
    }
}

pub fn temporary_folder() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let unique = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let folder = std::env::temp_dir().join(format!("minisgl-tiny-{unique}"));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn write_weights(path: &Path, tensors: &Value, embedding_scale: f32) {
    let tensors: Vec<(String, Vec<usize>)> = serde_json::from_value(tensors.clone()).unwrap();
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(name, shape)| {
            weights(name, shape.iter().product(), embedding_scale)
                .iter()
                .flat_map(|w| w.to_le_bytes())
                .collect()
        })
        .collect();
    let views = tensors.iter().zip(&data).map(|((name, shape), data)| {
        let dtype = safetensors::Dtype::F32;
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), data).unwrap();
        (name.as_str(), view)
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn weights(name: &str, count: usize, embedding_scale: f32) -> Vec<f32> {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    (0..count as u64)
        .map(|i| {
            let z = hash.wrapping_add(i).wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let u = ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32 - 0.5;
            if name.contains("norm") && name.ends_with("weight") {
                1.0 + u
            } else if name.contains("embed_tokens") {
                embedding_scale * u
            } else {
                0.5 * u
            }
        })
        .collect()
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<u8> = text.bytes().filter(|c| *c != b'=').map(digit).collect();
    let mut bytes: Vec<u8> = Vec::new();
    for four in digits.chunks(4) {
        let bits = four.iter().fold(0_u32, |bits, d| bits << 6 | u32::from(*d));
        let bits = bits << (6 * (4 - four.len()));
        bytes.extend(&bits.to_be_bytes()[1..four.len()]);
    }
    bytes
}
