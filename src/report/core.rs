//! `--core FILE`: guest RAM and the CPUs' registers as an ELF core file, which gdb opens (System V ABI, chapter 5; notes
//! as Linux writes them). Addresses in it are guest-physical ones.
//!
//! Invariant: RAM that the guest never touched is a hole in the file, and is not read. What bears the file's name is whole:
//! it is written beside it first, and a core file that cannot be finished is taken away.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::Scene;
use crate::arch::{CORE_MACHINE, CpuState};
use crate::host::file;
use crate::memory::{Memory, Span};

const ELF_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// One note for each CPU, of the kind that has the registers.
const NT_PRSTATUS: u32 = 1;
/// What stands before the registers in `struct elf_prstatus`: signals, process ids, times.
const BEFORE_REGISTERS: usize = 112;
const PID: usize = 32;
/// RAM begins at a multiple of this in the file, so that holes stay holes.
const ALIGN: u64 = 4096;
const CHUNK: u64 = 64 << 10;

/// Writes the core file, for as long as `enough` does not say that somebody has had enough.
///
/// # Errors
/// The file cannot be written, or not all of it.
pub fn write(scene: &Scene<'_>, path: &Path, enough: &dyn Fn() -> bool) -> Result<()> {
    let whole = |file| whole(scene, file, enough);
    // What is no file, as a device, is written to as it is.
    let written = match std::fs::metadata(path) {
        Ok(there) if !there.is_file() => file::in_place(path).map_err(anyhow::Error::from).and_then(whole),
        _ => file::replace(path, None, whole),
    };
    written.with_context(|| format!("--core {}", path.display()))
}

fn whole(scene: &Scene<'_>, file: File, enough: &dyn Fn() -> bool) -> Result<()> {
    let mut file = BufWriter::new(file);
    fill(scene, &mut file, enough)?;
    let mut file = file.into_inner().map_err(|e| e.into_error())?;
    let end = scene.memory.slots().iter().fold(start(scene), |at, slot| at.saturating_add(slot.span.size));
    // A hole at the end has to be made.
    Ok(file.set_len(end).and_then(|()| file.flush())?)
}

fn notes(scene: &Scene<'_>) -> Vec<u8> {
    let mut all = Vec::new();
    for vcpu in scene.vcpus {
        let Ok(state) = vcpu.state() else { continue };
        let status = status(&state, vcpu.id());
        let words = [5, u32::try_from(status.len()).unwrap_or(0), NT_PRSTATUS];
        words.iter().for_each(|word: &u32| all.extend(word.to_le_bytes()));
        all.extend(b"CORE\0\0\0\0");
        all.extend(status);
    }
    all
}

/// `struct elf_prstatus`: a process of its own for each CPU, since 0 is no process.
fn status(state: &CpuState, id: u32) -> Vec<u8> {
    let mut bytes = vec![0; BEFORE_REGISTERS];
    let pid = id.saturating_add(1).to_le_bytes();
    bytes.iter_mut().skip(PID).zip(pid).for_each(|(slot, byte)| *slot = byte);
    state.core_registers().iter().for_each(|register| bytes.extend(register.to_le_bytes()));
    // No floating-point registers follow.
    bytes.extend([0; 8]);
    bytes
}

/// Where RAM begins in the file.
fn start(scene: &Scene<'_>) -> u64 {
    let headers = ELF_HEADER + PROGRAM_HEADER * (scene.memory.slots().len() as u64 + 1);
    (headers + notes(scene).len() as u64).next_multiple_of(ALIGN)
}

fn fill(scene: &Scene<'_>, file: &mut (impl Write + Seek), enough: &dyn Fn() -> bool) -> Result<()> {
    let (slots, notes) = (scene.memory.slots(), notes(scene));
    let count = slots.len() as u64 + 1;
    let after = ELF_HEADER + PROGRAM_HEADER * count;
    // 64 bits, little-endian; type 4 is a core file.
    file.write_all(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0")?;
    file.write_all(&CORE_MACHINE.to_le_bytes())?;
    file.write_all(&1u32.to_le_bytes())?;
    for word in [0, ELF_HEADER, 0] {
        file.write_all(&u64::to_le_bytes(word))?;
    }
    file.write_all(&[0; 4])?;
    for half in [64, 56, u16::try_from(count)?, 0, 0, 0] {
        file.write_all(&u16::to_le_bytes(half))?;
    }
    header(file, PT_NOTE, after, Span { start: 0, size: notes.len() as u64 })?;
    let mut at = start(scene);
    for slot in &slots {
        header(file, PT_LOAD, at, slot.span)?;
        at = at.saturating_add(slot.span.size);
    }
    file.write_all(&notes)?;
    let mut at = start(scene);
    for slot in &slots {
        for part in scene.memory.touched(slot.span) {
            file.seek(SeekFrom::Start(at + (part.start - slot.span.start)))?;
            copy(scene.memory, part, file, enough)?;
        }
        at = at.saturating_add(slot.span.size);
    }
    Ok(())
}

fn header(file: &mut impl Write, kind: u32, offset: u64, span: Span) -> Result<()> {
    let (flags, align) = if kind == PT_LOAD { (7u32, ALIGN) } else { (4, 4) };
    file.write_all(&kind.to_le_bytes())?;
    file.write_all(&flags.to_le_bytes())?;
    let memory = if kind == PT_LOAD { span.size } else { 0 };
    for word in [offset, span.start, span.start, span.size, memory, align] {
        file.write_all(&word.to_le_bytes())?;
    }
    Ok(())
}

fn copy(memory: &Memory, part: Span, file: &mut impl Write, enough: &dyn Fn() -> bool) -> Result<()> {
    let mut done = 0;
    while done < part.size {
        ensure!(!enough(), "a signal ended the writing");
        let mut bytes = vec![0; usize::try_from(CHUNK.min(part.size - done))?];
        memory.read(part.start + done, &mut bytes)?;
        file.write_all(&bytes)?;
        done += bytes.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_core_file_is_whole_or_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("core");
        let size = 8 * CHUNK;
        let memory = Memory::new(&[Span { start: 0, size }], false).unwrap();
        memory.write(0, &vec![7; usize::try_from(size).unwrap()]).unwrap();
        let scene = Scene { vcpus: &[], memory: &memory, recent: &crate::trace::Recent::default() };
        let asked = std::cell::Cell::new(0);
        let count = || {
            asked.set(asked.get() + 1);
            asked.get() > 3
        };
        assert!(format!("{:#}", write(&scene, &path, &count).unwrap_err()).contains("signal"));
        assert_eq!((std::fs::read_dir(folder.path()).unwrap().count(), asked.get()), (0, 4));
        write(&scene, &path, &|| false).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!((std::fs::read_dir(folder.path()).unwrap().count(), mode), (1, 0o600));
        // What is there stays until there is a new one.
        let before = std::fs::read(&path).unwrap();
        assert!(write(&scene, &path, &|| true).is_err() && std::fs::read(&path).unwrap() == before);
        // A device is no name to be taken.
        write(&scene, Path::new("/dev/null"), &|| false).unwrap_err();
        assert!(!std::fs::metadata("/dev/null").unwrap().is_file());
    }
}
