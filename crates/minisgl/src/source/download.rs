//! Files from a web server: several at once, resumed, checked, renamed when whole.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use ureq::Agent;

const AT_ONCE: usize = 4;
const ATTEMPTS: usize = 3;

/// A file to fetch.
#[derive(Clone, Debug)]
pub struct RemoteFile {
    /// For the progress bar and for messages.
    pub name: String,
    /// Where it is.
    pub url: String,
    /// Where it goes.
    pub target: PathBuf,
    /// In bytes, if the server has said.
    pub size: Option<u64>,
    /// In hexadecimal, if the server has said.
    pub sha256: Option<String>,
}

/// An HTTP client that gives up on a silent server, and tells an error status from a network
/// failure.
pub(super) fn agent() -> Agent {
    Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(10)))
        .timeout_recv_response(Some(Duration::from_secs(30)))
        .http_status_as_error(false)
        .user_agent(concat!("minisgl/", env!("CARGO_PKG_VERSION")))
        .build()
        .into()
}

/// Fetches what is not there yet. Each file appears under its own name only when it is whole.
///
/// # Errors
/// The first failure, when all running downloads have ended.
pub(super) fn fetch_all(agent: &Agent, token: Option<&str>, files: &[RemoteFile]) -> Result<()> {
    let bars = MultiProgress::new();
    let next = AtomicUsize::new(0);
    let worker = || -> Result<()> {
        while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            fetch(agent, token, file, &bars)
                .with_context(|| format!("fetching {} from {}", file.name, file.url))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE.min(files.len())).map(|_| scope.spawn(worker)).collect();
        let results = workers.into_iter().map(|worker| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        results.fold(Ok(()), Result::and)
    })
}

fn fetch(
    agent: &Agent,
    token: Option<&str>,
    file: &RemoteFile,
    bars: &MultiProgress,
) -> Result<()> {
    if file.target.exists() {
        return Ok(());
    }
    let folder = file.target.parent().context("a download goes into a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let partial = partial_name(&file.target);
    let mut out = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&partial)
        .with_context(|| format!("writing {}", partial.display()))?;
    // Another process that fetches the same file holds this lock; then the file is here after it.
    out.lock().with_context(|| format!("locking {}", partial.display()))?;
    if file.target.exists() {
        return Ok(());
    }
    let bar = bars.add(progress_bar(file));
    for attempt in 1.. {
        match transfer(agent, token, file, &mut out, &bar) {
            Ok(()) => break,
            Err(error) if attempt == ATTEMPTS || error.is::<Refused>() => {
                // Something to resume from is worth keeping; nothing is not.
                if out.metadata().is_ok_and(|partial| partial.len() == 0) {
                    let _ = fs::remove_file(&partial);
                }
                return Err(error);
            }
            Err(_) => thread::sleep(Duration::from_secs(attempt as u64)),
        }
    }
    bar.finish_and_clear();
    if let Err(error) = check(&mut out, file) {
        // What is wrong as a whole cannot be resumed.
        let _ = fs::remove_file(&partial);
        return Err(error);
    }
    fs::rename(&partial, &file.target)
        .with_context(|| format!("renaming {} to {}", partial.display(), file.target.display()))
}

/// The server has answered, and the answer is no: asking again is of no use.
#[derive(Debug, thiserror::Error)]
#[error("the server answers {0}")]
struct Refused(ureq::http::StatusCode);

/// Appends to `out` what it lacks.
fn transfer(
    agent: &Agent,
    token: Option<&str>,
    file: &RemoteFile,
    out: &mut File,
    bar: &ProgressBar,
) -> Result<()> {
    let mut have = out.seek(SeekFrom::End(0))?;
    if file.size.is_some_and(|size| have > size) {
        out.set_len(0)?;
        have = 0;
    }
    if have > 0 && file.size == Some(have) {
        return Ok(());
    }
    let mut request = agent.get(&file.url);
    if let Some(token) = token {
        request = request.header("Authorization", format!("Bearer {token}"));
    }
    if have > 0 {
        request = request.header("Range", format!("bytes={have}-"));
    }
    let mut response = request.call()?;
    match response.status().as_u16() {
        206 => {}
        200 => {
            out.set_len(0)?;
            have = out.seek(SeekFrom::Start(0))?;
        }
        // Nothing follows what is there already.
        416 if have > 0 && file.size.is_none() => return Ok(()),
        _ => return Err(Refused(response.status()).into()),
    }
    bar.set_position(have);
    let mut body = response.body_mut().as_reader();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                out.write_all(&buffer[..n])?;
                bar.inc(n as u64);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("the connection broke off"),
        }
    }
    let have = out.stream_position()?;
    match file.size {
        Some(size) if have < size => bail!("the connection ended after {have} of {size} bytes"),
        _ => Ok(()),
    }
}

fn check(out: &mut File, file: &RemoteFile) -> Result<()> {
    let size = out.metadata()?.len();
    if let Some(expected) = file.size
        && size != expected
    {
        bail!("{} has {size} bytes, and should have {expected}", file.name);
    }
    if let Some(expected) = &file.sha256 {
        out.seek(SeekFrom::Start(0))?;
        let found = sha256(out)?;
        if !found.eq_ignore_ascii_case(expected) {
            bail!("{} has SHA-256 {found}, and should have {expected}", file.name);
        }
    }
    Ok(())
}

/// The SHA-256 of everything that is left in `reader`, in hexadecimal.
pub(super) fn sha256(reader: &mut impl Read) -> Result<String> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(digest.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            Ok(n) => digest.update(&buffer[..n]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// `x` is `x.incomplete` until it is whole, as the Python client calls it.
fn partial_name(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".incomplete");
    PathBuf::from(name)
}

fn progress_bar(file: &RemoteFile) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg:36!} {bar:24} {bytes:>11} of {total_bytes:<11} {bytes_per_sec:>12} {eta:>4}",
    )
    .expect("the template is valid");
    let bar = match file.size {
        Some(size) => ProgressBar::new(size),
        None => ProgressBar::no_length(),
    };
    bar.with_style(style).with_message(file.name.clone())
}
