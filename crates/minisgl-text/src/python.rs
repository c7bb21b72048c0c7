//! Values as Python writes them, which is what templates were written for.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value as JinjaValue};
use serde_json::{Number, Value};

/// What `{{ value }}` prints: Python's `str(value)`.
pub(crate) fn formatter(
    out: &mut Output,
    state: &mut State,
    value: &JinjaValue,
) -> Result<(), Error> {
    match value.kind() {
        ValueKind::String | ValueKind::Undefined => minijinja::escape_formatter(out, state, value),
        _ => out.write_str(&string(value.clone())).map_err(Error::from),
    }
}

/// The filter `string`: Python's `str(value)`.
pub(crate) fn string(value: JinjaValue) -> String {
    match (value.kind(), serde_json::to_value(&value)) {
        (
            ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Seq | ValueKind::Map,
            Ok(value),
        ) => {
            let mut text = String::new();
            write_repr(&mut text, &value);
            text
        }
        _ => value.to_string(),
    }
}

/// Python's `repr`.
fn write_repr(text: &mut String, value: &Value) {
    match value {
        Value::Null => text.push_str("None"),
        Value::Bool(true) => text.push_str("True"),
        Value::Bool(false) => text.push_str("False"),
        Value::Number(number) => text.push_str(&python_number(number)),
        Value::String(string) => write_quoted(text, string),
        Value::Array(items) => {
            text.push('[');
            for (index, item) in items.iter().enumerate() {
                text.push_str(if index > 0 { ", " } else { "" });
                write_repr(text, item);
            }
            text.push(']');
        }
        Value::Object(entries) => {
            text.push('{');
            for (index, (key, item)) in entries.iter().enumerate() {
                text.push_str(if index > 0 { ", " } else { "" });
                write_quoted(text, key);
                text.push_str(": ");
                write_repr(text, item);
            }
            text.push('}');
        }
    }
}

fn write_quoted(text: &mut String, string: &str) {
    let quote = if string.contains('\'') && !string.contains('"') { '"' } else { '\'' };
    text.push(quote);
    for character in string.chars() {
        match character {
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            found if found == quote => text.extend(['\\', found]),
            control if control < ' ' || control == '\u{7F}' => {
                text.push_str(&format!("\\x{:02x}", control as u32));
            }
            other => text.push(other),
        }
    }
    text.push(quote);
}

/// Python writes 1e20 as `1e+20` and 0.00001 as `1e-05`.
fn python_number(number: &Number) -> String {
    let Some(float) = number.as_f64().filter(|_| number.is_f64()) else {
        return number.to_string();
    };
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>().unwrap_or(0) {
        -4..16 => format!("{float:?}"),
        exponent => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
    }
}

/// How the filter `tojson` writes, after the arguments of Python's `json.dumps`.
struct JsonStyle {
    indent: Option<usize>,
    ensure_ascii: bool,
    sort_keys: bool,
    comma: String,
    colon: String,
}

/// Hugging Face's `tojson`: `json.dumps(value, ensure_ascii=False)`, without escapes for HTML.
pub(crate) fn tojson(value: JinjaValue, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let default_comma = if indent.is_some() { "," } else { ", " };
    let separators = separators.unwrap_or_else(|| vec![default_comma.into(), ": ".into()]);
    let [comma, colon] = <[String; 2]>::try_from(separators)
        .map_err(|_| invalid("tojson: separators are two strings"))?;
    let style = JsonStyle {
        indent: indent.map(|indent| indent.min(64)),
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        comma,
        colon,
    };
    kwargs.assert_all_used()?;
    let value =
        serde_json::to_value(&value).map_err(|error| invalid(&format!("tojson: {error}")))?;
    let mut text = String::new();
    style.write(&mut text, &value, 0);
    Ok(text)
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_string())
}

impl JsonStyle {
    fn write(&self, text: &mut String, value: &Value, depth: usize) {
        match value {
            Value::Array(items) if !items.is_empty() => {
                text.push('[');
                for (index, item) in items.iter().enumerate() {
                    self.begin_item(text, index, depth + 1);
                    self.write(text, item, depth + 1);
                }
                self.new_line(text, depth);
                text.push(']');
            }
            Value::Object(entries) if !entries.is_empty() => {
                let mut entries: Vec<_> = entries.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                text.push('{');
                for (index, (key, item)) in entries.into_iter().enumerate() {
                    self.begin_item(text, index, depth + 1);
                    self.write_string(text, key);
                    text.push_str(&self.colon);
                    self.write(text, item, depth + 1);
                }
                self.new_line(text, depth);
                text.push('}');
            }
            Value::String(string) => self.write_string(text, string),
            Value::Number(number) => text.push_str(&python_number(number)),
            scalar => text.push_str(&scalar.to_string()),
        }
    }

    fn begin_item(&self, text: &mut String, index: usize, depth: usize) {
        text.push_str(if index > 0 { &self.comma } else { "" });
        self.new_line(text, depth);
    }

    fn new_line(&self, text: &mut String, depth: usize) {
        if let Some(indent) = self.indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn write_string(&self, text: &mut String, string: &str) {
        let quoted = Value::from(string).to_string();
        if !self.ensure_ascii {
            return text.push_str(&quoted);
        }
        for character in quoted.chars() {
            if character.is_ascii() {
                text.push(character);
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    text.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
}
