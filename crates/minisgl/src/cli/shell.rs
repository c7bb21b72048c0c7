//! `minisgl shell`

use std::io::{BufRead, IsTerminal, stdin};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use clap::Args;
use minisgl::batch::user_message;
use minisgl::llm::{GenerateParams, Prompt, request};
use minisgl::options::RuntimeOptions;
use minisgl::runtime::Runtime;
use minisgl::source::cache_folder;
use minisgl_frontend::{Event, Generation, Usage};
use minisgl_scheduler::message::FinishReason;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};

use super::out;
use super::sampling::SamplingArgs;

/// Where no temperature is given: an answer that is asked for again should be another one.
const TEMPERATURE: f32 = 0.6;

const HELP: &str = "\
/reset   begin a new chat
/stats   what the engine has done, and what its cache holds
/help    this list
/exit    leave; Ctrl-D does, too
Ctrl-C   stop the answer, or drop the line
";

/// Chat with a model on this terminal.
#[derive(Args, Debug)]
pub struct ShellArgs {
    /// A system message in front of the chat
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    runtime: RuntimeOptions,
}

impl ShellArgs {
    pub(super) fn with(runtime: RuntimeOptions) -> Self {
        Self { system: None, sampling: SamplingArgs::default(), runtime }
    }

    pub(super) fn run(self) -> Result<()> {
        let params = self.sampling.params(TEMPERATURE);
        params.check().map_err(|message| anyhow!(message))?;
        let model = Runtime::start(&self.runtime)?;
        let interactive = stdin().is_terminal();
        let system = self.system.map(|text| json!({"role": "system", "content": text}));
        let chat = Chat {
            params,
            interactive,
            threads: tokio::runtime::Builder::new_current_thread().enable_all().build()?,
            messages: system.iter().cloned().collect(),
            system,
            model,
        };
        if interactive { chat.run_on_terminal() } else { chat.run_on_lines(stdin().lock()) }
    }
}

/// What runs, on what, with how much room.
pub(super) fn banner(model: &Runtime) -> String {
    let limits = model.frontend.limits();
    format!(
        "minisgl {} · {} · {} · KV cache of {} tokens · {} requests at once",
        env!("CARGO_PKG_VERSION"),
        model.model,
        model.device,
        limits.pages * limits.page_size,
        limits.slots,
    )
}

struct Chat {
    model: Runtime,
    params: GenerateParams,
    /// Whether somebody types, and may type Ctrl-C.
    interactive: bool,
    threads: tokio::runtime::Runtime,
    system: Option<Value>,
    messages: Vec<Value>,
}

impl Chat {
    fn run_on_terminal(mut self) -> Result<()> {
        out(&format!("{}\n/help lists the commands.\n", banner(&self.model)))?;
        let mut editor = DefaultEditor::new()?;
        let history: PathBuf = cache_folder().join("shell_history");
        // There is none before the first time.
        let _ = editor.load_history(&history);
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    let _ = editor.add_history_entry(&line);
                    if !self.turn(&line)? {
                        break;
                    }
                }
                Err(ReadlineError::Interrupted) => {}
                Err(ReadlineError::Eof) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if let Err(error) = editor.save_history(&history) {
            tracing::warn!("{}: {error}", history.display());
        }
        Ok(())
    }

    fn run_on_lines(mut self, lines: impl BufRead) -> Result<()> {
        for line in lines.split(b'\n') {
            if !self.turn(&String::from_utf8_lossy(&line?))? {
                break;
            }
        }
        Ok(())
    }

    /// Does what one line asks for; false when it asks to leave. What is wrong with a line is said,
    /// and the chat goes on; only an engine that has failed ends it.
    fn turn(&mut self, line: &str) -> Result<bool> {
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => return Ok(false),
            "/help" => out(HELP)?,
            "/stats" => out(&self.stats())?,
            "/reset" => {
                self.messages = self.system.iter().cloned().collect();
                out("A new chat.\n")?;
            }
            command if command.starts_with('/') => {
                out(&format!("{command} is no command; /help lists them.\n"))?;
            }
            text => {
                self.messages.push(user_message(text));
                if let Err(error) = self.answer() {
                    self.messages.pop();
                    if let Some(failure) = self.model.frontend.failure() {
                        return Err(anyhow!("the engine has failed: {failure}"));
                    }
                    eprintln!("error: {error:#}; /reset begins a new chat");
                }
            }
        }
        Ok(true)
    }

    fn answer(&mut self) -> Result<()> {
        let request = request(Prompt::Chat(self.messages.clone()), &self.params);
        let started = Instant::now();
        let generation = self.model.frontend.submit(request)?;
        let prompt_tokens = generation.prompt_tokens();
        let mut answer = Answer::default();
        let interactive = self.interactive;
        self.threads.block_on(async {
            tokio::select! {
                read = answer.read(generation, started) => read,
                // Dropping the generation aborts it.
                _ = tokio::signal::ctrl_c(), if interactive => Ok(()),
            }
        })?;
        out(if answer.text.ends_with('\n') { "" } else { "\n" })?;
        eprintln!("{}", answer.summary(prompt_tokens, started.elapsed()));
        self.messages.push(json!({"role": "assistant", "content": answer.text}));
        Ok(())
    }

    fn stats(&self) -> String {
        let frontend = &self.model.frontend;
        let stats = frontend.scheduler_stats();
        let page_size = frontend.limits().page_size as u64;
        let [pages, free, cached] = [&stats.pages, &stats.pages_free, &stats.pages_cached]
            .map(|pages| pages.load(Relaxed) * page_size);
        format!(
            "{}\n{} prompt tokens, {} of them from the cache; {} generated in {} steps\n\
             KV cache: {cached} tokens kept, {free} of {pages} free\n",
            banner(&self.model),
            stats.prompt_tokens.load(Relaxed),
            stats.cached_tokens.load(Relaxed),
            stats.generated_tokens.load(Relaxed),
            stats.steps.load(Relaxed),
        )
    }
}

/// What has come of an answer so far.
#[derive(Default)]
struct Answer {
    text: String,
    tokens: usize,
    first: Option<Duration>,
    /// Known once it has ended by itself.
    usage: Option<Usage>,
}

impl Answer {
    async fn read(&mut self, mut generation: Generation, started: Instant) -> Result<()> {
        while let Some(event) = generation.recv().await {
            match event {
                Event::Prompt { .. } => {}
                Event::Text { text, tokens, .. } => {
                    self.first.get_or_insert_with(|| started.elapsed());
                    self.tokens += tokens.len();
                    self.text.push_str(&text);
                    out(&text)?;
                }
                Event::Finished { reason, usage, .. } => match reason {
                    FinishReason::Refused(refusal) => return Err(refusal.into()),
                    FinishReason::ConstraintFailed(message) | FinishReason::Error(message) => {
                        return Err(anyhow!(message));
                    }
                    _ => self.usage = Some(usage),
                },
            }
        }
        Ok(())
    }

    fn summary(&self, prompt_tokens: u32, elapsed: Duration) -> String {
        let first = self.first.unwrap_or(elapsed);
        let decode = (elapsed - first).as_secs_f64().max(1e-9);
        let rate = self.tokens.saturating_sub(1) as f64 / decode;
        let cached = match self.usage {
            Some(usage) => format!("{} from the cache", usage.cached_tokens),
            None => "stopped".to_string(),
        };
        format!(
            "[{prompt_tokens} tokens in, {cached} · first after {:.0} ms · {} out, {rate:.0} tokens/s]",
            first.as_secs_f64() * 1e3,
            self.tokens,
        )
    }
}
