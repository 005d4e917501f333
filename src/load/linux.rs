//! Linux images: recognised, so that nobody wonders why one runs as if it were a flat binary; not started yet.
//!
//! Invariant: only marks that no other format has are looked at.

use anyhow::Result;

use super::elf::machine_name;
use crate::arch;
use crate::error::{Refusal, refuse};

fn at<const N: usize>(head: &[u8], offset: usize) -> Option<[u8; N]> {
    head.get(offset..)?.first_chunk().copied()
}

/// "Not yet", for an image this host's CPU could run.
pub fn not_yet(what: &str) -> Refusal {
    refuse(format!("this is {what}; starting Linux is not yet supported"))
        .hint("flat binaries, ELF and multiboot kernels run; see bantam example")
}

/// A guest of another architecture.
pub fn foreign(name: &str) -> Refusal {
    let article = if name.starts_with(['a', 'e', 'i', 'o', 'u', 'x']) { "an" } else { "a" };
    refuse(format!("this is {article} {name} guest; this host is {}", arch::NAME))
}

fn image_for(name: &str, what: &str) -> Refusal {
    if name == arch::NAME { not_yet(what) } else { foreign(name) }
}

/// Refuses what is a Linux image in a format of Linux's own.
pub fn refuse_image(head: &[u8]) -> Result<(), Refusal> {
    // Linux Documentation/arch/x86/boot.rst: the setup header of a bzImage.
    if at(head, 0x1fe) == Some([0x55, 0xaa]) && at(head, 0x202) == Some(*b"HdrS") {
        let [minor, major] = at(head, 0x206).unwrap_or_default();
        let what = format!("a Linux kernel image (bzImage, boot protocol {major}.{minor:02})");
        return Err(image_for("x86-64", &what));
    }
    // Documentation/arch/arm64/booting.rst and arch/riscv/boot-image-header.rst: the magic number at byte 56.
    if at(head, 0x38) == Some(*b"ARM\x64") {
        return Err(image_for("arm64", "a Linux kernel image for arm64"));
    }
    if at(head, 0x38) == Some(*b"RSC\x05") {
        return Err(foreign("riscv"));
    }
    // include/linux/pe.h: a compressed image that unpacks itself as an EFI program.
    if head.starts_with(b"MZ") && at(head, 4) == Some(*b"zimg") {
        let what = "a compressed Linux kernel image (EFI zboot)";
        return Err(pe_machine(head).map_or_else(|| not_yet(what), |name| image_for(name, what)));
    }
    Ok(())
}

/// The architecture of a PE file (PE format, "Machine Types").
fn pe_machine(head: &[u8]) -> Option<&'static str> {
    let pe = usize::try_from(u32::from_le_bytes(at(head, 0x3c)?)).ok()?;
    let signature: [u8; 6] = at(head, pe)?;
    match signature {
        [b'P', b'E', 0, 0, 0x64, 0xaa] => machine_name(183),
        [b'P', b'E', 0, 0, 0x64, 0x86] => machine_name(62),
        [b'P', b'E', 0, 0, 0x64, 0x50] => machine_name(243),
        [b'P', b'E', 0, 0, 0x64, 0x62] => machine_name(258),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(marks: &[(usize, &[u8])]) -> String {
        let mut head = vec![0; 0x400];
        for (offset, bytes) in marks {
            head[*offset..][..bytes.len()].copy_from_slice(bytes);
        }
        for cut in 0..head.len() {
            let _ = refuse_image(&head[..cut]);
        }
        refuse_image(&head).map_or_else(|e| e.to_string(), |()| String::new())
    }

    /// A Linux image for `name`, refused as one for here, or for elsewhere.
    fn assert_image(name: &str, text: &str) {
        let here = name == arch::NAME && text.contains("not yet supported");
        assert!(here || text.ends_with(&format!("{name} guest; this host is {}", arch::NAME)), "{name}: {text}");
    }

    #[test]
    fn linux_images_are_recognised_by_their_own_marks() {
        let text = with(&[(0x1fe, b"\x55\xaa"), (0x202, b"HdrS\x0f\x02")]);
        assert_image("x86-64", &text);
        assert!(arch::NAME != "x86-64" || text.contains("bzImage, boot protocol 2.15"), "{text}");
        assert_image("arm64", &with(&[(0x38, b"ARM\x64")]));
        assert_image("riscv", &with(&[(0x38, b"RSC\x05")]));
        let zboot: [(usize, &[u8]); 2] = [(0, b"MZ\0\0zimg"), (0x3c, &[0x80])];
        assert!(with(&zboot).contains("zboot"));
        let arm = [zboot[0], zboot[1], (0x80, b"PE\0\0\x64\xaa")];
        assert_image("arm64", &with(&arm));
        let x86 = [zboot[0], zboot[1], (0x80, b"PE\0\0\x64\x86")];
        assert_image("x86-64", &with(&x86));
    }

    #[test]
    fn half_a_mark_is_none() {
        assert_eq!(with(&[(0x1fe, b"\x55\xaa")]), "");
        assert_eq!(with(&[(0x202, b"HdrS")]), "");
        assert_eq!(with(&[(0, b"MZ")]), "");
    }
}
