//! Calls in a model's text: found in each family's form however the text is cut, given out as they
//! come, and told apart from what only looks like one.

use minisgl_text::{ToolCallParser, ToolFormat, ToolPiece};

/// Content, and name and arguments of each call, of a text that comes in `pieces`.
fn split(format: ToolFormat, pieces: &[&str]) -> (String, Vec<(String, String)>) {
    let mut parser = ToolCallParser::new(format);
    let (mut content, mut calls) = (String::new(), Vec::new());
    let mut take = |piece: ToolPiece| match piece {
        ToolPiece::Content(text) => {
            assert!(!text.is_empty());
            content.push_str(&text);
        }
        ToolPiece::Start { index, name } => {
            assert_eq!(index, calls.len());
            calls.push((name, String::new()));
        }
        ToolPiece::Arguments { index, json } => calls[index].1.push_str(&json),
    };
    for piece in pieces {
        parser.push(piece, &mut take);
    }
    parser.finish(&mut take);
    (content, calls)
}

/// A text in a format, its content, and the names and arguments of its calls.
type Case<'a> = (ToolFormat, &'a str, &'a str, &'a [(&'a str, &'a str)]);

#[test]
fn texts_are_parsed_the_same_however_they_are_cut() {
    use ToolFormat::{Hermes, Llama, Mistral, MistralArgs};
    let one = r#"{"a": "é<b>"}"#;
    let table: [Case<'_>; 32] = [
        (
            Hermes,
            "Let me look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"é<b>\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>",
            "Let me look.\n",
            &[("f", one), ("g", "{}")],
        ),
        (Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {}}", "", &[("f", "{}")]),
        (Hermes, "<tool_call>{oops}</tool_call> x", "<tool_call>{oops}</tool_call> x", &[]),
        (Hermes, "<tool_call>{\"name\": \"f\"", "<tool_call>{\"name\": \"f\"", &[]),
        (Hermes, "1 < 2 <tool", "1 < 2 <tool", &[]),
        // From the first of its arguments on it is a call, however it goes on.
        (
            Hermes,
            "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": [1, ",
            "",
            &[("f", "{\"a\": [1, ")],
        ),
        (
            Hermes,
            "<tool_call>{\"name\": \"f\", \"arguments\": {} oops}</tool_call> so",
            "oops}</tool_call> so",
            &[("f", "{}")],
        ),
        (Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool", "", &[("f", "{}")]),
        (
            Hermes,
            "<tool_call>{\"name\": \"f\", \"arguments\": {}} \n and <tool_call>{}",
            " \n and <tool_call>{}",
            &[("f", "{}")],
        ),
        // Members in any order, and others beside them; braces and tags in strings are text.
        (
            Hermes,
            r#"<tool_call>{"id": [7, "}"], "n": 7, "arguments": {"a": "\"}</tool_call>{"}, "name": "\u0066", "z": null}</tool_call>"#,
            "",
            &[("f", r#"{"a": "\"}</tool_call>{"}"#)],
        ),
        (
            Hermes,
            r#"<tool_call>{"name" : "f", "arguments" : {"a": {"b": [[], {}]}} , "name": {}}</tool_call>"#,
            "",
            &[("f", r#"{"a": {"b": [[], {}]}}"#)],
        ),
        (Hermes, r#"<tool_call>{"name": 7, "#, r#"<tool_call>{"name": 7, "#, &[]),
        (Hermes, r#"<tool_call>{"name": "", "#, r#"<tool_call>{"name": "", "#, &[]),
        (
            Hermes,
            "<tool_call><tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>",
            "<tool_call>",
            &[("f", "{}")],
        ),
        (Llama, r#"{"name": "f", "parameters": {"a": "é<b>"}}"#, "", &[("f", one)]),
        (
            Llama,
            r#"<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}"#,
            "",
            &[("f", "{}"), ("g", "{}")],
        ),
        (Llama, r#"{"answer": 42}"#, r#"{"answer": 42}"#, &[]),
        (
            Llama,
            r#" {"name": "f", "parameters": {}} {"name": "g", "parameters": {}}; so"#,
            "; so",
            &[("f", "{}"), ("g", "{}")],
        ),
        (Llama, "<|py is é", "<|py is é", &[]),
        (Llama, "Say {\"name\": 1}", "Say {\"name\": 1}", &[]),
        (
            Mistral,
            r#"[TOOL_CALLS] [{"name": "f", "arguments": {"a": "é<b>"}}, {"name": "g", "arguments": {}}]"#,
            "",
            &[("f", one), ("g", "{}")],
        ),
        (Mistral, "a [TOOL_CALLS] [{", "a [TOOL_CALLS] [{", &[]),
        (
            Mistral,
            r#"[TOOL_CALLS][{"name": "f", "arguments": {}}] [TOOL_CALLS][{"name": "g", "arguments": {"#,
            "",
            &[("f", "{}"), ("g", "{")],
        ),
        (Mistral, r#"[TOOL_CALLS][{"name": "f", "arguments": {}}, 7]"#, ", 7]", &[("f", "{}")]),
        (Mistral, "[TOOL_CALLS][]", "[TOOL_CALLS][]", &[]),
        (
            Mistral,
            r#"[TOOL_CALLS][{"name": "f", "arguments": "x"}]"#,
            r#"[TOOL_CALLS][{"name": "f", "arguments": "x"}]"#,
            &[],
        ),
        (
            MistralArgs,
            r#"So: [TOOL_CALLS]f[ARGS]{"a": "é<b>"}[TOOL_CALLS]g[CALL_ID]1a2[ARGS]{}"#,
            "So: ",
            &[("f", one), ("g", "{}")],
        ),
        (MistralArgs, r#"[TOOL_CALLS][{"name": "f", "arguments": {}}]"#, "", &[("f", "{}")]),
        (MistralArgs, "[TOOL_CALLS]f[ARGS]{", "", &[("f", "{")]),
        (MistralArgs, "[TOOL_CALLS]f[ARGS]7", "[TOOL_CALLS]f[ARGS]7", &[]),
        (MistralArgs, "[TOOL_CALLS][ARGS]{}", "[TOOL_CALLS][ARGS]{}", &[]),
        (MistralArgs, "[TOOL_CALLS]f[ARGS]{} so", " so", &[("f", "{}")]),
    ];
    for (format, text, content, calls) in table {
        let calls = calls.iter().map(|&(n, a)| (n.to_string(), a.to_string())).collect();
        let expected = (content.to_string(), calls);
        let cuts: Vec<usize> = (0..=text.len()).filter(|&at| text.is_char_boundary(at)).collect();
        for &first in &cuts {
            for &second in cuts.iter().filter(|&&second| second >= first) {
                let pieces = [&text[..first], &text[first..second], &text[second..]];
                assert_eq!(split(format, &pieces), expected, "{pieces:?}");
            }
        }
        let pieces: Vec<&str> = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect();
        assert_eq!(split(format, &pieces), expected, "{text:?} by characters");
    }
}

#[test]
fn content_is_given_out_as_it_comes() {
    let mut parser = ToolCallParser::new(ToolFormat::Hermes);
    let mut given = Vec::new();
    for text in ["Hi", " there <", "b> <tool_call>"] {
        parser.push(text, &mut |piece| given.push(piece));
    }
    let content = ["Hi", " there ", "<b> "].map(|text| ToolPiece::Content(text.to_string()));
    assert_eq!(given, content);
}

#[test]
fn arguments_are_given_out_as_they_come() {
    let call = r#"{"name": "f", "arguments": {"a": "b c"}}"#;
    let texts = [
        (ToolFormat::Hermes, format!("<tool_call>{call}</tool_call>")),
        (ToolFormat::Llama, call.to_string()),
        (ToolFormat::Mistral, format!("[TOOL_CALLS][{call}]")),
        (ToolFormat::MistralArgs, r#"[TOOL_CALLS]f[ARGS]{"a": "b c"}"#.to_string()),
    ];
    for (format, text) in texts {
        let mut parser = ToolCallParser::new(format);
        let mut given = Vec::new();
        for byte in text.chars() {
            parser.push(byte.encode_utf8(&mut [0; 4]), &mut |piece| given.push(piece));
        }
        let mut expected = vec![ToolPiece::Start { index: 0, name: "f".to_string() }];
        expected.extend(
            r#"{"a": "b c"}"#
                .chars()
                .map(|json| ToolPiece::Arguments { index: 0, json: json.to_string() }),
        );
        assert_eq!(given, expected, "{format:?}");
    }
}

#[test]
fn a_name_without_end_is_content_before_the_end() {
    let text = format!("[TOOL_CALLS]{}", "é".repeat(300));
    let mut parser = ToolCallParser::new(ToolFormat::MistralArgs);
    let mut content = String::new();
    parser.push(&text, &mut |piece| match piece {
        ToolPiece::Content(text) => content += &text,
        piece => panic!("{piece:?}"),
    });
    assert_eq!(content, text);
}

#[test]
fn templates_say_their_format() {
    assert_eq!(ToolFormat::detect("within <tool_call></tool_call>"), Some(ToolFormat::Hermes));
    assert_eq!(ToolFormat::detect("{{ '[TOOL_CALLS]' }}"), Some(ToolFormat::Mistral));
    let newer = "{{ '[TOOL_CALLS]' + name + '[ARGS]' }}";
    assert_eq!(ToolFormat::detect(newer), Some(ToolFormat::MistralArgs));
    assert_eq!(ToolFormat::detect("{{ \"<|python_tag|>\" }}"), Some(ToolFormat::Llama));
    assert_eq!(ToolFormat::detect("{{ messages }}"), None);
}
