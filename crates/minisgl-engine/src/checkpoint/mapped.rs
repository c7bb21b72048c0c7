//! Read-only files in memory: the crate's only unsafe lines.

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

    /// Lets go of the pages of `part`, if it is one of this file, so that they count no longer as this
    /// process's memory. Whoever reads them again gets them back from the file.
    pub fn release(&self, part: &[u8]) {
        let Some(offset) = part.as_ptr().addr().checked_sub(self.map.as_ptr().addr()) else {
            return;
        };
        if offset + part.len() > self.map.len() {
            return;
        }
        #[cfg(unix)]
        // SAFETY: the pages are those of a file, and nobody has written to them: they come back as they
        // were. Where the system does not want to let go of them, nothing is lost.
        #[expect(unsafe_code, reason = "there is no safe form; see SAFETY")]
        let _ = unsafe {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            self.map.unchecked_advise_range(advice, offset, part.len())
        };
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// How much of the mapping that begins at `address` is in memory as this process's, in kB.
    fn resident(address: usize) -> usize {
        let all = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mine = all.split_once(&format!("{address:x}-")).unwrap().1;
        let line = mine.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn released_pages_leave_and_come_back() {
        let path = std::env::temp_dir().join(format!("minisgl-mapped-{}", std::process::id()));
        let content: Vec<u8> = (0..4 << 20).map(|i: u32| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = MappedFile::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(file.bytes(), content);
        let address = file.bytes().as_ptr().addr();
        assert_eq!(resident(address), 4 << 10);
        file.release(&file.bytes()[1 << 20..]);
        // The system may let go of more than that: large pages are not split.
        assert!(resident(address) <= 1 << 10);
        file.release(&[0; 64]);
        assert_eq!(file.bytes(), content);
    }
}
