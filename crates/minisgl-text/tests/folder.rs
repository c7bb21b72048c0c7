//! A model's folder in Hugging Face layout: which file says what.

use std::path::PathBuf;

use minisgl_text::{ChatRequest, TextModel};
use serde_json::{Value, json};

/// A folder of its own for each test, removed when the test ends.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("minisgl-text-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).expect("the temporary folder is writable");
        let folder = Self(path);
        let special = |id: u32, content: &str| {
            json!({
                "id": id, "content": content, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false,
            })
        };
        folder.json("tokenizer.json", &json!({
            "version": "1.0",
            "added_tokens": [special(2, "<s>"), special(3, "</s>"), special(4, "<|end|>")],
            "normalizer": null, "pre_tokenizer": null, "decoder": null,
            "post_processor": {
                "type": "TemplateProcessing", "pair": [],
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}},
            },
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
        }));
        folder
    }

    fn json(&self, name: &str, value: &Value) {
        self.text(name, &value.to_string());
    }

    fn text(&self, name: &str, text: &str) {
        std::fs::write(self.0.join(name), text).expect("the folder is writable");
    }

    fn open(&self) -> anyhow::Result<TextModel> {
        TextModel::from_folder(&self.0)
    }

    fn rendered(&self, tools: Option<Vec<Value>>) -> String {
        let messages = vec![json!({"role": "user", "content": "a"})];
        let request = ChatRequest { tools, ..ChatRequest::new(messages) };
        self.open().expect("it opens").render_chat(&request).expect("it renders")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Nothing is lost if a temporary folder stays.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn every_file_may_name_ends() {
    let folder = Folder::new("ends");
    assert!(folder.open().expect("it opens").eos_ids.is_empty());
    folder.json("tokenizer_config.json", &json!({"eos_token": {"content": "</s>"}}));
    assert_eq!(folder.open().expect("it opens").eos_ids, [3]);
    folder.json("generation_config.json", &json!({"eos_token_id": [4, 3]}));
    assert_eq!(folder.open().expect("it opens").eos_ids, [3, 4]);
    folder.json("config.json", &json!({"text_config": {"eos_token_id": 1}}));
    assert_eq!(folder.open().expect("it opens").eos_ids, [1, 3, 4]);
}

#[test]
fn a_template_stands_in_one_of_three_files() {
    let folder = Folder::new("templates");
    assert!(folder.open().expect("it opens").template.is_none());
    let named = json!([
        {"name": "default", "template": "{{ bos_token }}default"},
        {"name": "tool_use", "template": "tools"},
    ]);
    folder.json("tokenizer_config.json", &json!({"bos_token": "<s>", "chat_template": named}));
    assert_eq!(folder.rendered(None), "<s>default");
    assert_eq!(folder.rendered(Some(vec![json!({})])), "tools");
    folder.json("chat_template.json", &json!({"chat_template": "json"}));
    assert_eq!(folder.rendered(None), "json");
    folder.text("chat_template.jinja", "jinja{{ eos_token }}");
    assert_eq!(folder.rendered(None), "jinja");
}

#[test]
fn a_prompt_begins_as_the_post_processor_says() {
    let model = Folder::new("prompt").open().expect("it opens");
    assert_eq!(model.encode_prompt("ab", 9), Ok(vec![2, 0, 1]));
    assert_eq!(model.encode_prompt("", 9), Ok(vec![2]));
}

#[test]
fn a_file_that_is_wrong_is_named() {
    let folder = Folder::new("wrong");
    let error = |folder: &Folder| format!("{:#}", folder.open().err().expect("it is refused"));
    folder.text("generation_config.json", "{");
    assert!(error(&folder).contains("generation_config.json"));
    folder.text("generation_config.json", "{}");
    folder.text("chat_template.jinja", "{% if %}");
    assert!(error(&folder).contains("syntax error"));
    folder.text("tokenizer.json", "{}");
    assert!(error(&folder).contains("tokenizer.json"));
}
