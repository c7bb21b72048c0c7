//! `/openapi.json`, made from the types that serve, and `/docs`, a page that shows it.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{Html, IntoResponse, Response};
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::app::App;
use crate::error::ErrorBody;
use crate::wire::chat::{ChatChunk, ChatCompletion, ChatFields};
use crate::wire::completion::{Completion, CompletionFields};
use crate::wire::info::{
    DetokenizeRequest, Detokenized, Flushed, Load, Loads, ModelCard, ModelInfo, ModelList,
    ServerInfo, TokenizeRequest, Tokenized, Version,
};
use crate::wire::native::{NativeAnswer, NativeOutput, NativeRequest};
use crate::wire::sampling::Common;

/// `/openapi.json`
pub async fn document(State(app): State<Arc<App>>) -> Response {
    let has_key = app.options.api_key.is_some();
    let json = serde_json::to_vec(&openapi(has_key)).expect("it is made of plain values");
    ([(header::CONTENT_TYPE, "application/json")], json).into_response()
}

/// `/docs`
pub async fn page() -> Html<&'static str> {
    Html(include_str!("docs.html"))
}

/// The document; `has_key` tells whether a key is asked for.
fn openapi(has_key: bool) -> Value {
    let mut api = Api::new();
    let common = api.schema::<Common>();
    let with_common = |own: Value| json!({"allOf": [common, own]});
    let chat = with_common(api.schema::<ChatFields>());
    let completion = with_common(api.schema::<CompletionFields>());
    let native = api.schema::<NativeRequest>();
    let tokenize = api.schema::<TokenizeRequest>();
    let detokenize = api.schema::<DetokenizeRequest>();
    api.post::<ChatCompletion<'_>>("/v1/chat/completions", "Answer a chat", Some(chat));
    api.post::<Completion<'_>>("/v1/completions", "Continue texts", Some(completion));
    api.post::<NativeAnswer<'_>>("/generate", "Continue texts, in SGLang's form", Some(native));
    api.streams::<ChatChunk<'_>>("/v1/chat/completions");
    api.streams::<Completion<'_>>("/v1/completions");
    api.streams::<NativeOutput<'_>>("/generate");
    api.post::<Tokenized>("/tokenize", "Text or a chat to token ids", Some(tokenize));
    api.post::<Detokenized>("/detokenize", "Token ids to text", Some(detokenize));
    let flush = "Empty the prefix cache of what no request uses";
    api.post::<Flushed>("/flush_cache", flush, None);
    api.get::<Flushed>("/flush_cache", flush);
    api.get::<ModelList<'_>>("/v1/models", "The models served");
    api.get::<ModelCard<'_>>("/v1/models/{name}", "One of them");
    api.takes_name("/v1/models/{name}");
    for path in ["/model_info", "/get_model_info"] {
        api.get::<ModelInfo<'_>>(path, "About the model");
    }
    for path in ["/server_info", "/get_server_info"] {
        api.get::<ServerInfo<'_>>(path, "About the server");
    }
    api.get::<Vec<Load>>("/get_load", "What there is to do");
    api.get::<Loads>("/v1/loads", "What there is to do, in more detail");
    api.get::<Version>("/version", "The program's version");
    api.get::<()>("/health", "200 while requests can be run");
    api.get::<()>("/health_generate", "200 behind a token that was made for it");
    api.get::<String>("/metrics", "Counters, gauges and histograms for Prometheus");
    api.document(has_key)
}

/// A document being written.
struct Api {
    schemas: SchemaGenerator,
    paths: Map<String, Value>,
}

impl Api {
    fn new() -> Self {
        let settings = SchemaSettings::draft2020_12()
            .with(|settings| settings.definitions_path = "/components/schemas".into());
        Self { schemas: settings.into_generator(), paths: Map::new() }
    }

    fn schema<T: JsonSchema>(&mut self) -> Value {
        self.schemas.subschema_for::<T>().to_value()
    }

    fn get<A: JsonSchema>(&mut self, path: &str, summary: &str) {
        let responses = self.responses::<A>(&["503"]);
        let operation = json!({"summary": summary, "responses": responses});
        self.add(path, "get", operation);
    }

    fn post<A: JsonSchema>(&mut self, path: &str, summary: &str, body: Option<Value>) {
        let errors = ["400", "404", "408", "413", "415", "503", "504"];
        let mut operation = json!({"summary": summary, "responses": self.responses::<A>(&errors)});
        if let Some(schema) = body {
            let content = json!({"application/json": {"schema": schema}});
            operation["requestBody"] = json!({"required": true, "content": content});
        }
        self.add(path, "post", operation);
    }

    /// Says that the answer comes in events of this type where `stream` asks for them.
    fn streams<E: JsonSchema>(&mut self, path: &str) {
        let events = [self.schema::<E>(), self.schema::<ErrorBody<'_>>()];
        let event = json!({"schema": {"anyOf": events}});
        self.paths[path]["post"]["responses"]["200"]["content"]["text/event-stream"] = event;
    }

    /// Describes the `{name}` in a path.
    fn takes_name(&mut self, path: &str) {
        let schema = json!({"type": "string", "minLength": 1});
        let name = json!({"name": "name", "in": "path", "required": true, "schema": schema});
        let operation = &mut self.paths[path]["get"];
        operation["parameters"] = json!([name]);
        let refusal = operation["responses"]["503"].clone();
        operation["responses"]["404"] = refusal;
    }

    fn add(&mut self, path: &str, method: &str, operation: Value) {
        self.paths.entry(path).or_insert_with(|| json!({}))[method] = operation;
    }

    fn responses<A: JsonSchema>(&mut self, errors: &[&str]) -> Value {
        let answer = self.schema::<A>();
        let error = self.schema::<ErrorBody<'_>>();
        let (content_type, is_empty) = match std::any::type_name::<A>() {
            "()" => ("", true),
            name if name.ends_with("String") => ("text/plain", false),
            _ => ("application/json", false),
        };
        let mut responses = Map::new();
        let success = if is_empty {
            json!({"description": "Yes"})
        } else {
            let content = json!({content_type: {"schema": answer}});
            json!({"description": "The answer; a stream of events where one is asked for",
                   "content": content})
        };
        responses.insert("200".to_string(), success);
        for status in errors.iter().chain(&["401"]) {
            let content = json!({"application/json": {"schema": error}});
            let refusal = json!({"description": "What is wrong", "content": content});
            responses.insert((*status).to_string(), refusal);
        }
        Value::Object(responses)
    }

    fn document(mut self, has_key: bool) -> Value {
        let mut document = json!({
            "openapi": "3.1.0",
            "info": {"title": "minisgl", "version": env!("CARGO_PKG_VERSION")},
            "paths": self.paths,
            "components": {"schemas": self.schemas.take_definitions(true)},
        });
        if has_key {
            let scheme = json!({"key": {"type": "http", "scheme": "bearer"}});
            document["components"]["securitySchemes"] = scheme;
            document["security"] = json!([{"key": []}]);
            document["paths"]["/health"]["get"]["security"] = json!([]);
        }
        document
    }
}
