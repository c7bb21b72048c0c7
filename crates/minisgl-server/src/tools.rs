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
        Some(GrammarSource::Lark(calls(&self.required, self.format(text)?, text)))
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

/// A grammar of one call of one of these functions. Each schema is a document of its own in it, in
/// which its references lead where they are meant to.
fn calls(functions: &[Value], format: ToolFormat, text: &TextModel) -> String {
    let open = mark(format.open(), text);
    let args = mark("[ARGS]", text);
    let start = match format {
        ToolFormat::Hermes => format!(r#"{open} "\n" call "\n</tool_call>""#),
        ToolFormat::Llama => "call".to_string(),
        ToolFormat::Mistral => format!(r#"{open} "[" call "]""#),
        ToolFormat::MistralArgs => format!("{open} call"),
    };
    let key = if format == ToolFormat::Llama { "parameters" } else { "arguments" };
    let (mut names, mut rules) = (Vec::new(), String::new());
    for (index, function) in functions.iter().enumerate() {
        let name = &function["name"];
        let call = match format {
            ToolFormat::MistralArgs => format!("{name} {args} arguments_{index}"),
            _ => {
                let head = Value::from(format!(r#"{{"name": {name}, "{key}": "#));
                format!(r#"{head} arguments_{index} "}}""#)
            }
        };
        let schema = arguments_schema(&function["parameters"]);
        rules += &format!("call_{index}: {call}\narguments_{index}: %json {schema}\n");
        names.push(format!("call_{index}"));
    }
    format!("start: {start}\ncall: {}\n{rules}", names.join(" | "))
}

/// Arguments are an object, whatever the schema leaves open.
fn arguments_schema(parameters: &Value) -> Value {
    let mut schema = match parameters {
        Value::Null => json!({}),
        parameters => parameters.clone(),
    };
    if let Some(schema) = schema.as_object_mut() {
        if !schema.contains_key("$ref") {
            schema.entry("type").or_insert(json!("object"));
        }
        schema.insert("x-guidance".to_string(), json!({"whitespace_flexible": false}));
    }
    schema
}

/// A token, where the vocabulary has a special one for these words; else the words.
fn mark(words: &str, text: &TextModel) -> String {
    match text.tokenizer.token_id(words) {
        Some(id) if text.tokenizer.is_special(id) => format!("<[{id}]>"),
        _ => Value::from(words).to_string(),
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
