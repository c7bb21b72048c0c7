//! Chat templates: the same text as Hugging Face's `apply_chat_template` on every stored
//! conversation (`scripts/make_chat_references.py` makes the references).

use std::path::{Path, PathBuf};

use minisgl_text::{ChatRequest, ChatTemplate, TextError};
use serde_json::{Map, Value, json};

/// Model, `bos_token`, `eos_token`, and whether the template takes content in parts.
const MODELS: [(&str, Option<&str>, &str, bool); 5] = [
    ("smollm2", Some("<|im_start|>"), "<|im_end|>", false),
    ("llama-3.1", Some("<|begin_of_text|>"), "<|eot_id|>", false),
    ("qwen3", None, "<|im_end|>", false),
    ("mistral-nemo", Some("<s>"), "</s>", false),
    ("gemma-3", Some("<bos>"), "<eos>", true),
];

fn data(name: &str) -> String {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn values(name: &str) -> Vec<Value> {
    serde_json::from_str(&data(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn template(model: &str) -> ChatTemplate {
    let (_, bos, eos, _) = MODELS.into_iter().find(|found| found.0 == model).expect("it is listed");
    let mut specials = Map::from_iter([("eos_token".to_string(), json!(eos))]);
    if let Some(bos) = bos {
        specials.insert("bos_token".into(), json!(bos));
    }
    ChatTemplate::new(&data(&format!("templates/{model}.jinja")), specials).expect("it compiles")
}

fn request(conversation: &Value) -> ChatRequest {
    let list = |name: &str| conversation[name].as_array().cloned();
    ChatRequest {
        messages: list("messages").expect("there are messages"),
        tools: list("tools"),
        add_generation_prompt: conversation["add_generation_prompt"].as_bool().unwrap_or(true),
        continue_final_message: conversation["continue_final_message"].as_bool().unwrap_or(false),
        kwargs: conversation["kwargs"].as_object().cloned().unwrap_or_default(),
    }
}

fn renders_as_hugging_face_does(model: &str) {
    let template = template(model);
    let takes_parts = MODELS.iter().any(|found| found.0 == model && found.3);
    assert_eq!(template.takes_parts(), takes_parts);
    let conversations = values("conversations.json");
    let expected = values(&format!("rendered/{model}.json"));
    assert_eq!(conversations.len(), expected.len());
    let mut texts = 0;
    for (conversation, expected) in conversations.iter().zip(&expected) {
        let name = &conversation["name"];
        if conversation["parts"] == true && !takes_parts {
            continue;
        }
        match (template.render(&request(conversation)), expected) {
            (Ok(text), Value::String(expected)) => {
                assert_eq!(&text, expected, "{model}: {name}");
                texts += 1;
            }
            (Err(TextError::Template(message)), Value::Object(error)) => {
                let error = error["error"].as_str().expect("an error has a message");
                // What a template says itself is said again; Python's own words are not.
                let is_raised = error.contains("must alternate") || error.contains("only supports");
                assert!(!is_raised || message.contains(error), "{model}: {name}: {message}");
            }
            (found, expected) => panic!("{model}: {name}: {found:?}, not {expected}"),
        }
    }
    assert!(texts >= 30, "only {texts} texts were compared");
}

#[test]
fn smollm2() {
    renders_as_hugging_face_does("smollm2");
}

#[test]
fn llama_3_1() {
    renders_as_hugging_face_does("llama-3.1");
}

#[test]
fn qwen3() {
    renders_as_hugging_face_does("qwen3");
}

#[test]
fn mistral_nemo() {
    renders_as_hugging_face_does("mistral-nemo");
}

#[test]
fn gemma_3() {
    renders_as_hugging_face_does("gemma-3");
}

/// Renders one user message with a template of the test's own.
fn render(source: &str) -> Result<String, TextError> {
    let template = ChatTemplate::new(source, Map::new())?;
    template.render(&ChatRequest::new(vec![json!({"role": "user", "content": "hi"})]))
}

/// Expected texts are what Jinja2 3.1.6 gives with Hugging Face's settings.
#[test]
fn what_templates_use_means_what_it_means_in_python() {
    let cases = [
        // Blocks take the white space before them and the line end behind them with them.
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "013",
        ),
        ("{% generation %}x{% endgeneration %}{%- generation -%} y {%- endgeneration -%}", "xy"),
        ("{{ none }} {{ true }} {{ false }} {{ missing }}", "None True False "),
        ("{{ [1, 'a', none, 1.0, [true]] }}", "[1, 'a', None, 1.0, [True]]"),
        ("{{ {'a': \"it's\", 'b': {'c': 'x\\ny'}} }}", r#"{'a': "it's", 'b': {'c': 'x\ny'}}"#),
        ("{{ {'a': [none]}|string }}|{{ true|string }}", "{'a': [None]}|True"),
        ("{{ 1e20 }} {{ 0.00001 }} {{ 1.5 }}", "1e+20 1e-05 1.5"),
        (
            "{{ {'b': '<&\\'\"é\\u2028', 'a': [1, 2.0]}|tojson }}",
            "{\"b\": \"<&'\\\"é\u{2028}\", \"a\": [1, 2.0]}",
        ),
        (
            "{{ {'b': [], 'a': {}, 'c': [1]}|tojson(indent=2) }}",
            "{\n  \"b\": [],\n  \"a\": {},\n  \"c\": [\n    1\n  ]\n}",
        ),
        (
            "{{ {'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':')) }}",
            "{\"a\":2,\"b\":1}",
        ),
        ("{{ 'é'|tojson(ensure_ascii=true) }}", "\"\\u00e9\""),
        (
            "{{ ' a b '.strip() }}|{{ 'a,b'.split(',')[-1] }}|{{ 'xax'.replace('x', 'y') }}|{{ 'ab'.title() }}",
            "a b|b|yay|Ab",
        ),
        (
            "{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith('x') }} {{ 'abc'.upper() }} {{ 'a-b'.find('-') }}",
            "True False ABC 1",
        ),
        (
            "{{ messages[0].get('content') }} {{ messages[0].get('x', 'y') }} {{ messages[0].items()|list|length }}",
            "hi y 2",
        ),
        (
            "{% set ns = namespace(a=1) %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}",
            "4",
        ),
        (
            "{% macro f(x, y='z') %}{{ x }}{{ y }}{% endmacro %}{{ f('a') }}{{ f('b', y='c') }}",
            "azbc",
        ),
        (
            "{{ messages[::-1]|length }} {{ messages[-1]['role'] }} {{ 'abc'[:-1] }} {{ 'abc'[1] }}",
            "1 user ab b",
        ),
        ("{{ 'a' ~ 1 ~ 'b' }} {{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 3 }}", "a1b 3 1 8"),
        (
            "{{ tools is none }} {{ tools is defined }} {{ documents is defined }} {{ x is defined }}",
            "True True True False",
        ),
        ("{{ [{'r': 'u'}, {'r': 'a'}]|selectattr('r', 'equalto', 'u')|list|length }}", "1"),
        (
            "{{ ['b', 'a']|sort|join(', ') }} {{ 'x'|upper }} {{ '%s-%d'|format('a', 3) }}",
            "a, b X a-3",
        ),
    ];
    for (source, expected) in cases {
        assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
    }
}

#[test]
fn the_date_is_written_as_python_writes_it() {
    let date = render("{{ strftime_now('%d %b %Y|%Y-%m-%d|%B|%A') }}").expect("it renders");
    let parts: Vec<&str> = date.split('|').collect();
    let (short, iso) = (parts[0], parts[1]);
    assert_eq!((short.len(), iso.len(), parts.len()), (11, 10, 4), "{date}");
    assert_eq!(short[7..], iso[..4], "{date}");
    assert_eq!(short[3..6], parts[2][..3], "{date}");
}

#[test]
fn a_template_that_fails_says_why() {
    let message = |source: &str| match render(source) {
        Err(TextError::Template(message)) => message,
        other => panic!("{source}: {other:?}"),
    };
    assert_eq!(message("{{ raise_exception('Only users, please') }}"), "Only users, please");
    assert!(message("\n{{ 1 + 'a' }}").contains("chat:2"), "{}", message("\n{{ 1 + 'a' }}"));
    assert!(message("{{ nothing.at_all }}").contains("undefined"));
    assert!(message("{% if %}").contains("syntax error"));
    assert!(message("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").contains("recursion"));
}

/// Each of these would run for hours, or take all memory.
#[test]
fn a_template_without_end_is_an_error() {
    let started = std::time::Instant::now();
    for source in [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% for k in range(100000) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s|length }}",
        "{{ 'x' * 100000000000 }}",
        "{{ range(100000000000)|list|length }}",
        "{% for i in range(100000) %}{{ '%10000000s'|format('x') }}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{{ messages|tojson }}{% endfor %}{% endfor %}",
    ] {
        assert!(matches!(render(source), Err(TextError::Template(_))), "{source}");
    }
    assert!(started.elapsed().as_secs() < 60, "took {:?}", started.elapsed());
}

/// The limits leave room for what is honest: a million characters, in a thousand messages.
#[test]
fn a_long_conversation_renders() {
    let line = "All work and no play makes Jack a dull boy. ".repeat(23);
    let roles = ["user", "assistant"].into_iter().cycle();
    let messages = roles.take(1001).map(|role| json!({"role": role, "content": line}));
    for (model, ..) in MODELS {
        let text = template(model).render(&ChatRequest::new(messages.clone().collect()));
        assert!(text.expect("it renders").len() > 1_000_000, "{model}");
    }
}
