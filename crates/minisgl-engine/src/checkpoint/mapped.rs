//! Read-only files in memory: the crate's only unsafe line.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};

/// A file, mapped.
pub struct MappedFile {
    map: memmap2::Mmap,
}

impl MappedFile {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        // SAFETY: The map is only read, as bytes, for which every value is valid. A file that
        // somebody truncates while it is served ends the process with SIGBUS; as everywhere in
        // this field, checkpoints are taken to be left alone while they are in use.
        #[expect(unsafe_code, reason = "mapping a file has no safe form; see SAFETY")]
        let map = unsafe { memmap2::Mmap::map(&file) }
            .with_context(|| format!("cannot map {}", path.display()))?;
        Ok(Self { map })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}
