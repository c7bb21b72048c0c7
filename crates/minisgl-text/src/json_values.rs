//! How much memory JSON may take once it is parsed.

/// Values that JSON from outside may have where they are kept as a tree: two bytes of text can be a
/// value that takes some 300 bytes of memory.
pub const JSON_VALUES_MAX: usize = 1 << 17;

/// At most so many values are in this text, if it is JSON. Takes no memory.
pub fn json_values(text: &[u8]) -> usize {
    let (mut values, mut is_string, mut is_escaped) = (1, false, false);
    for &byte in text {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = is_string,
            b'"' => is_string = !is_string,
            // Each value but the first of a list stands behind a comma.
            b',' | b'[' | b'{' if !is_string => values += 1,
            _ => {}
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_and_text_is_not() {
        for (json, values) in [
            ("7", 1),
            ("[1, 2, 3]", 4),
            (r#"{"a": {"b": 1}, "c": [2, 3]}"#, 6),
            (r#"["[,{", "\"[,", "\\", 1]"#, 5),
        ] {
            assert_eq!(json_values(json.as_bytes()), values, "{json}");
        }
    }
}
