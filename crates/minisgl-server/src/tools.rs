//! The functions that a chat's model may call, and whether it must.

use minisgl_frontend::GrammarSource;
use minisgl_text::{TextModel, ToolFormat};
use serde_json::{Value, json};

use crate::error::ApiError;

/// What a request says about functions.
#[derive(Debug, Default)]
pub struct Tools {
    /// As the chat template gets them; `None` where there are none or none may be called.
    pub list: Option<Vec<Value>>,
    /// Schemas of the calls of which the answer must be one; empty where it need not be any.
    required: Vec<Value>,
}

impl Tools {
    /// From the fields `tools` and `tool_choice`.
    ///
    /// # Errors
    /// Names the field that is wrong.
    pub fn parse(tools: Option<Vec<Value>>, choice: Option<&Value>) -> Result<Self, ApiError> {
        let list = tools.unwrap_or_default();
        for (index, tool) in list.iter().enumerate() {
            check(index, tool)?;
        }
        let invalid = |message: &str| Err(ApiError::invalid("tool_choice", message));
        let mut functions = list.iter().map(|tool| &tool["function"]);
        let required: Vec<Value> = match choice {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::String(choice)) => match choice.as_str() {
                "auto" => Vec::new(),
                "none" => return Ok(Self::default()),
                "required" if list.is_empty() => return invalid("needs tools"),
                "required" => functions.cloned().collect(),
                _ => return invalid("is none of auto, none, required and a function"),
            },
            Some(choice) => match choice["function"]["name"].as_str() {
                Some(name) => match functions.find(|function| function["name"] == name) {
                    Some(function) => vec![function.clone()],
                    None => return invalid("names a function that is not in tools"),
                },
                None => return invalid("is none of auto, none, required and a function"),
            },
        };
        Ok(Self { list: (!list.is_empty()).then_some(list), required })
    }

    /// What the answer must be where it must be a call: one, as the model writes it.
    pub fn grammar(&self, text: &TextModel) -> Option<GrammarSource> {
        if self.required.is_empty() {
            return None;
        }
        let format = self.format(text)?;
        let arguments = if format == ToolFormat::Llama { "parameters" } else { "arguments" };
        let call = |function: &Value| {
            let parameters = match &function["parameters"] {
                Value::Null => json!({"type": "object"}),
                parameters => parameters.clone(),
            };
            json!({
                "type": "object",
                "properties": {"name": {"const": function["name"]}, arguments: parameters},
                "required": ["name", arguments],
                "additionalProperties": false,
            })
        };
        let calls: Vec<Value> = self.required.iter().map(call).collect();
        let call = json!({"anyOf": calls, "x-guidance": {"whitespace_flexible": false}});
        let open = match text.tokenizer.token_id(format.open()) {
            Some(mark) if text.tokenizer.is_special(mark) => format!("<[{mark}]>"),
            _ => Value::from(format.open()).to_string(),
        };
        let start = match format {
            ToolFormat::Hermes => format!(r#"{open} "\n" call "\n</tool_call>""#),
            ToolFormat::Llama => "call".to_string(),
            ToolFormat::Mistral => format!(r#"{open} "[" call "]""#),
        };
        Some(GrammarSource::Lark(format!("start: {start}\ncall: %json {call}\n")))
    }

    /// The form in which calls are to be found in the model's text, if they are.
    pub fn format(&self, text: &TextModel) -> Option<ToolFormat> {
        self.list.as_ref()?;
        let format = text.template.as_ref()?.tool_format();
        // A call can be asked of a model that was never told how to write one.
        let forced = (!self.required.is_empty()).then_some(ToolFormat::Hermes);
        format.or(forced)
    }
}

/// Whether the calls in a model's text are seen only where special tokens are part of it.
pub fn marks_calls_by_special_token(text: &TextModel, format: ToolFormat) -> bool {
    let mark = text.tokenizer.token_id(format.open());
    mark.is_some_and(|mark| text.tokenizer.is_special(mark))
}

fn check(index: usize, tool: &Value) -> Result<(), ApiError> {
    let kind = &tool["type"];
    if !kind.is_null() && kind != "function" {
        let message = format!("{kind} is not \"function\"");
        return Err(ApiError::invalid(format!("tools[{index}].type"), message));
    }
    match tool["function"]["name"].as_str() {
        Some(name) if !name.is_empty() => Ok(()),
        _ => {
            let message = "is missing or not a string";
            Err(ApiError::invalid(format!("tools[{index}].function.name"), message))
        }
    }
}
