//! The functions that a chat's model may call, and whether it must.

use minisgl_text::{TextModel, ToolFormat};
use serde_json::Value;

use crate::error::ApiError;

/// What a request says about functions.
#[derive(Debug, Default)]
pub struct Tools {
    /// As the chat template gets them; `None` where there are none or none may be called.
    pub list: Option<Vec<Value>>,
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
        match choice.map(Value::as_str) {
            None | Some(Some("auto")) => Ok(Self { list: (!list.is_empty()).then_some(list) }),
            Some(Some("none")) => Ok(Self::default()),
            Some(_) => Err(ApiError::invalid("tool_choice", "is neither auto nor none")),
        }
    }

    /// The form in which calls are to be found in the model's text, if they are.
    pub fn format(&self, text: &TextModel) -> Option<ToolFormat> {
        self.list.as_ref()?;
        text.template.as_ref()?.tool_format()
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
