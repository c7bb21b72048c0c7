//! A timeline of the engine's steps, in the form that Perfetto and Chrome's `about:tracing` read.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use minisgl_scheduler::stats::{StepObserver, StepTimes};

/// Takes the times of steps and of their text, and has a thread of its own write them.
pub struct Trace {
    spans: Sender<Spans>,
}

enum Spans {
    Step(StepTimes),
    Text { began: Instant, took: Duration, tokens: usize },
}

impl Trace {
    /// Begins a file. It can be read at any time, also when the program ended without a word: the
    /// format does without its last bracket.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let name = || format!("--trace {}", path.display());
        let mut writer = Writer {
            file: BufWriter::new(File::create(path).with_context(name)?),
            began: Instant::now(),
            engine_free: Duration::ZERO,
            device_named: false,
        };
        writer.begin().with_context(name)?;
        let (spans, received) = channel();
        let run = move || {
            if let Err(error) = writer.run(&received) {
                tracing::error!("the trace ends here: {error}");
            }
        };
        thread::Builder::new().name("trace".into()).spawn(run).context("starting a thread")?;
        Ok(Self { spans })
    }
}

impl StepObserver for Trace {
    fn step(&self, times: &StepTimes) {
        // A trace that cannot be written has said so.
        let _ = self.spans.send(Spans::Step(*times));
    }

    fn text(&self, began: Instant, took: Duration, tokens: usize) {
        let _ = self.spans.send(Spans::Text { began, took, tokens });
    }
}

struct Writer {
    file: BufWriter<File>,
    began: Instant,
    /// When the engine's last step was done.
    engine_free: Duration,
    /// Whether the device's row has its name.
    device_named: bool,
}

/// Rows of the timeline.
const SCHEDULER: u32 = 1;
const ENGINE: u32 = 2;
const DEVICE: u32 = 3;
const TEXT: u32 = 4;

impl Writer {
    fn begin(&mut self) -> std::io::Result<()> {
        self.file.write_all(b"[")?;
        for (row, name) in [(SCHEDULER, "scheduler"), (ENGINE, "engine"), (TEXT, "text")] {
            self.name(row, name)?;
        }
        self.file.flush()
    }

    fn name(&mut self, row: u32, name: &str) -> std::io::Result<()> {
        writeln!(
            self.file,
            r#"{{"ph":"M","pid":1,"tid":{row},"name":"thread_name","args":{{"name":"{name}"}}}},"#
        )
    }

    fn run(mut self, received: &Receiver<Spans>) -> std::io::Result<()> {
        while let Ok(spans) = received.recv() {
            self.spans(&spans)?;
            for spans in received.try_iter() {
                self.spans(&spans)?;
            }
            self.file.flush()?;
        }
        Ok(())
    }

    fn spans(&mut self, spans: &Spans) -> std::io::Result<()> {
        match spans {
            Spans::Step(times) => self.step(times),
            Spans::Text { began, took, tokens } => {
                let began = began.saturating_duration_since(self.began);
                let args = format!(r#"{{"tokens":{tokens}}}"#);
                self.span(TEXT, "detokenize", began, *took, &args)
            }
        }
    }

    fn step(&mut self, times: &StepTimes) -> std::io::Result<()> {
        let planned = times.planned_at.saturating_duration_since(self.began);
        let waited = times.waited_at.saturating_duration_since(self.began);
        let (launched, finished) = (planned + times.plan, waited + times.wait);
        let StepTimes { step, rows, tokens, .. } = times;
        let args = format!(r#"{{"step":{step},"rows":{rows},"tokens":{tokens}}}"#);
        self.span(SCHEDULER, "plan", planned, times.plan, &args)?;
        self.span(SCHEDULER, "launch", launched, times.launch, &args)?;
        self.span(SCHEDULER, "wait", waited, times.wait, &args)?;
        self.span(SCHEDULER, "commit", finished, times.commit, &args)?;
        // As the host sees it: a step begins when it was launched and the one before is done.
        let began = (launched + times.launch).max(self.engine_free).min(finished);
        self.engine_free = finished;
        let name = if times.tokens == times.rows { "decode" } else { "prefill" };
        self.span(ENGINE, name, began, finished - began, &args)?;
        let Some(span) = times.on_device else { return Ok(()) };
        if !self.device_named {
            self.name(DEVICE, "device")?;
            self.device_named = true;
        }
        let began = span.began.saturating_duration_since(self.began);
        self.span(DEVICE, name, began, span.took, &args)
    }

    fn span(
        &mut self,
        row: u32,
        name: &str,
        begin: Duration,
        length: Duration,
        args: &str,
    ) -> std::io::Result<()> {
        let (begin, length) = (begin.as_secs_f64() * 1e6, length.as_secs_f64() * 1e6);
        writeln!(
            self.file,
            r#"{{"ph":"X","pid":1,"tid":{row},"name":"{name}","ts":{begin:.1},"dur":{length:.1},"args":{args}}},"#
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minisgl_scheduler::plan::DeviceSpan;

    #[test]
    fn a_timeline_lacks_only_its_last_bracket() {
        let path = std::env::temp_dir().join(format!("minisgl-trace-{}", std::process::id()));
        let trace = Trace::create(&path).unwrap();
        let now = Instant::now();
        let ms = Duration::from_millis;
        trace.step(&StepTimes {
            step: 7,
            rows: 2,
            tokens: 40,
            planned_at: now,
            plan: ms(1),
            launch: ms(2),
            waited_at: now + ms(3),
            wait: ms(4),
            commit: ms(5),
            on_device: Some(DeviceSpan { began: now + ms(4), took: ms(2) }),
        });
        trace.text(now + ms(12), ms(6), 2);
        let read = || std::fs::read_to_string(&path).unwrap();
        let waited = Instant::now();
        while read().lines().count() < 11 && waited.elapsed() < Duration::from_secs(10) {
            thread::sleep(ms(5));
        }
        let text = read();
        std::fs::remove_file(&path).unwrap();
        let json = format!("{}]", text.trim_end().trim_end_matches(','));
        let events: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
        let spans: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
        let names: Vec<&str> = spans.iter().map(|e| e["name"].as_str().unwrap()).collect();
        let expected = ["plan", "launch", "wait", "commit", "prefill", "prefill", "detokenize"];
        assert_eq!(names, expected);
        let row_of = |name: &str| {
            let named = events.iter().find(|e| e["ph"] == "M" && e["args"]["name"] == name);
            &named.unwrap()["tid"]
        };
        assert_eq!((&spans[4]["tid"], &spans[4]["dur"]), (row_of("engine"), &4000.0.into()));
        assert_eq!((&spans[5]["tid"], &spans[5]["dur"]), (row_of("device"), &2000.0.into()));
        let planned_at = spans[0]["ts"].as_f64().unwrap();
        assert_eq!(spans[5]["ts"].as_f64().unwrap() - planned_at, 4000.0);
        assert_eq!((&spans[6]["dur"], &spans[6]["args"]["tokens"]), (&6000.0.into(), &2.into()));
    }
}
