//! Forms that an answer must have, and which tokens they leave open at each step.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use llguidance::api::{GrammarInit, TopLevelGrammar};
use llguidance::earley::lexerspec::LexerSpec;
use llguidance::toktrie::{TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use minisgl_scheduler::message::Constraint;
use minisgl_text::TextModel;
use serde_json::{Value, json};

/// What compiling takes grows with the text; no form that people write is longer.
const SOURCE_BYTES_MAX: usize = 64 << 10;
/// Compiling follows references by recursion, as far as a text of that length can lead. Memory is
/// taken only for what is used.
pub(crate) const STACK_BYTES: usize = 256 << 20;
/// States of one answer's lexer, of 1 or 2 KiB each.
const LEXER_STATES_MAX: usize = 50_000;

/// A form, as a request has it.
#[derive(Clone, Debug)]
pub enum GrammarSource {
    /// Any JSON object.
    JsonObject,
    /// JSON that satisfies a schema, written without white space between its parts.
    JsonSchema(Value),
    /// A text that a regular expression matches as a whole.
    Regex(String),
    /// A grammar in Lark's notation.
    Lark(String),
}

/// A form, compiled for one model. Clones share it.
#[derive(Clone)]
pub struct Grammar {
    start: Arc<Mutex<Matcher>>,
    words: usize,
    eos_ids: Arc<[u32]>,
}

/// Why a form cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(String);

/// Compiles forms for one model.
pub(crate) struct GrammarCompiler {
    parsers: ParserFactory,
    /// `u32`s in a mask.
    words: usize,
    eos_ids: Arc<[u32]>,
}

impl GrammarCompiler {
    /// Sorts the vocabulary, which takes its time. Masks have a bit for each of `vocab_size` ids.
    pub fn new(text: &TextModel, vocab_size: usize) -> Result<Self, GrammarError> {
        let Some(&eos) = text.eos_ids.first() else {
            return Err(GrammarError("the model has no end-of-sequence token".to_string()));
        };
        let token = |id: u32| {
            let bytes = text.tokenizer.token_bytes(id).unwrap_or_default();
            let is_mark = text.tokenizer.is_special(id) || text.eos_ids.contains(&id);
            let mark = is_mark.then_some(TokTrie::SPECIAL_TOKEN_MARKER);
            mark.into_iter().chain(bytes.iter().copied()).collect()
        };
        let tokens: Vec<Vec<u8>> = (0..vocab_size as u32).map(token).collect();
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, eos), &tokens);
        let trie = trie.with_eos_tokens(&text.eos_ids);
        let environment: Arc<dyn TokenizerEnv + Sync> = Arc::new(Vocabulary(trie));
        let mut parsers = ParserFactory::new_simple(&environment).map_err(GrammarError::new)?;
        parsers.quiet();
        let limits = parsers.limits_mut();
        // An error must not show the parser's insides.
        limits.verbose_errors = false;
        limits.max_lexer_states = LEXER_STATES_MAX;
        let eos_ids = text.eos_ids.as_slice().into();
        Ok(Self { parsers, words: vocab_size.div_ceil(32), eos_ids })
    }

    /// Compiles a form within bounds of time and memory, on a thread that is made for it.
    pub fn compile(&self, source: &GrammarSource) -> Result<Grammar, GrammarError> {
        thread::scope(|scope| {
            let compile = || self.compile_here(source);
            let thread = thread::Builder::new().name("grammar".into()).stack_size(STACK_BYTES);
            let compiled = thread.spawn_scoped(scope, compile).map_err(GrammarError::new)?.join();
            compiled.unwrap_or_else(|_| Err(GrammarError("compiling it panicked".to_string())))
        })
    }

    fn compile_here(&self, source: &GrammarSource) -> Result<Grammar, GrammarError> {
        let Self { parsers, .. } = self;
        let source = GrammarInit::Serialized(source.parse()?);
        let vocabulary = Some(parsers.tok_env().clone());
        let compiled = source.to_internal(vocabulary, parsers.limits().clone());
        let (grammar, lexer) = compiled.map_err(GrammarError::new)?;
        self.check_first_bytes(lexer.clone()).map_err(GrammarError::new)?;
        let compiled = GrammarInit::Internal(grammar, lexer);
        let mut matcher = Matcher::new(parsers.create_parser_from_init_default(compiled));
        // The first mask takes the most time, and shows that an answer can begin at all. Clones
        // have it.
        matcher.compute_mask_or_eos().map_err(GrammarError::new)?;
        Ok(Grammar {
            start: Arc::new(Mutex::new(matcher)),
            words: self.words,
            eos_ids: Arc::clone(&self.eos_ids),
        })
    }

    /// Tries all first bytes, within a bound. Making a parser does the same without one, and takes
    /// hours over an integer that is a multiple of 99999999.
    fn check_first_bytes(&self, mut spec: LexerSpec) -> anyhow::Result<()> {
        let mut limits = self.parsers.limits().clone();
        // As making a parser does.
        spec.add_extra_lexemes(&self.parsers.extra_lexemes());
        let mut lexer = spec.to_regex_vec(&mut limits)?;
        lexer.set_fuel(limits.initial_lexer_fuel);
        let start = lexer.initial_state(&spec.all_lexemes());
        for byte in 0..=u8::MAX {
            lexer.transition(start, byte);
            anyhow::ensure!(!lexer.has_error(), "it is too complex");
        }
        Ok(())
    }
}

impl GrammarSource {
    fn parse(&self) -> Result<TopLevelGrammar, GrammarError> {
        let length = match self {
            Self::JsonObject => 0,
            Self::JsonSchema(schema) => schema.to_string().len(),
            Self::Regex(text) | Self::Lark(text) => text.len(),
        };
        if length > SOURCE_BYTES_MAX {
            let message = format!("{length} bytes are too many; {SOURCE_BYTES_MAX} may be");
            return Err(GrammarError(message));
        }
        match self {
            Self::JsonObject => Ok(TopLevelGrammar::from_json_schema(dense(&json!({
                "type": "object"
            })))),
            Self::JsonSchema(schema) => Ok(TopLevelGrammar::from_json_schema(dense(schema))),
            Self::Regex(regex) => Ok(TopLevelGrammar::from_regex(regex)),
            Self::Lark(grammar) => Ok(TopLevelGrammar::from_lark(grammar.clone())),
        }
    }
}

/// Asks for JSON without white space, of which small models write without end.
fn dense(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Some(schema) = schema.as_object_mut() {
        schema.entry("x-guidance").or_insert(json!({"whitespace_flexible": false}));
    }
    schema
}

impl GrammarError {
    fn new(error: impl fmt::Display) -> Self {
        let error = format!("{error:#}");
        // What stands in place of the parser's insides, and what it calls a mask without a token.
        let error = error.trim_end_matches("\n<non-verbose/>");
        Self(error.replace("NoExtensionBias", "no token can come next"))
    }
}

impl Grammar {
    /// The form of one choice, before its first token.
    pub(crate) fn constraint(&self) -> Box<dyn Constraint> {
        let start = self.start.lock().unwrap_or_else(PoisonError::into_inner);
        let eos_ids = Arc::clone(&self.eos_ids);
        Box::new(Progress { matcher: start.deep_clone(), words: self.words, eos_ids })
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

/// How far one choice has come.
struct Progress {
    matcher: Matcher,
    words: usize,
    eos_ids: Arc<[u32]>,
}

impl Constraint for Progress {
    fn mask(&mut self) -> Result<Option<Arc<Vec<u32>>>, String> {
        let allowed = self.matcher.compute_mask_or_eos();
        let allowed = allowed.map_err(|error| GrammarError::new(error).0)?;
        let mut mask = allowed.as_slice().to_vec();
        mask.resize(self.words, 0);
        Ok(Some(Arc::new(mask)))
    }

    /// The end of a form is EOS, which is all that its last mask allows: what the token before
    /// says is still part of the text.
    fn advance(&mut self, token: u32) -> Result<bool, String> {
        if self.eos_ids.contains(&token) {
            return Ok(false);
        }
        self.matcher.consume_token(token).map_err(|error| GrammarError::new(error).0)?;
        Ok(true)
    }
}

/// The tokens of a model. How a text is best cut into them is left to the model.
struct Vocabulary(TokTrie);

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.0.greedy_tokenize(bytes)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}
