//! What a virtio device costs outside its own files (DESIGN rule 9: at most ten lines), for `cargo xtask stats`.
//!
//! Invariant: what is counted is listed, so that a reader may check it. A line counts once for each device that it names: by
//! its module (`mod rng;`, `rng::…`, `virtio::rng`) or by the option's field (`.rng`, `rng: …`). Comments, strings and tests
//! do not count, nor do lines that serve a device without naming it.

use std::fmt::Write as _;

use crate::stats::scrub;

/// Lines that a device may cost.
const MOST: usize = 10;

/// A device: its module, its option, and beginnings of the paths of files that are for it alone.
type Device = (&'static str, &'static str, &'static [&'static str]);

const DEVICES: [Device; 6] = [
    (
        "block",
        "disk",
        &[
            "src/virtio/block",
            "src/config/disks.rs",
            "src/host/sys/disk.rs",
            "src/host/sys/uring.rs",
            "src/host/sys/room.rs",
        ],
    ),
    ("net", "net", &["src/virtio/net", "src/host/sys/tap.rs"]),
    ("vsock", "vsock", &["src/virtio/vsock"]),
    ("console", "console", &["src/virtio/console"]),
    ("balloon", "balloon", &["src/virtio/balloon"]),
    ("rng", "rng", &["src/virtio/rng"]),
];

/// Where nobody can name a virtio device, but a wire has the name of one.
const APART: [&str; 2] = ["src/device/", "src/console.rs"];

/// The lines of a file that name a device, with their numbers.
fn naming<'a>(text: &'a str, module: &str, option: &str) -> Vec<(usize, &'a str)> {
    let bare = scrub(text);
    let mut test = false;
    let mut found = Vec::new();
    for (number, (code, line)) in bare.lines().zip(text.lines()).enumerate() {
        // Tests are at the end of a file, or in one of their own.
        let module_of_tests = std::mem::replace(&mut test, code.trim() == "#[cfg(test)]");
        if module_of_tests && code.trim_end().ends_with('{') {
            break;
        }
        if names(code, module, option) {
            found.push((number + 1, line.trim()));
        }
    }
    found
}

fn names(code: &str, module: &str, option: &str) -> bool {
    let letter = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    // Where the word stands for itself: what is before it and behind it.
    let places = |word: &str| -> Vec<(String, String)> {
        let split =
            |(at, _): (usize, &str)| Some((code.get(..at)?.to_owned(), code.get(at + word.len()..)?.to_owned()));
        let whole = |(a, b): &(String, String)| !letter(a.chars().next_back()) && !letter(b.chars().next());
        code.match_indices(word).filter_map(split).filter(whole).collect()
    };
    let by_module = places(module).iter().any(|(before, behind)| {
        before.ends_with("virtio::") || before.ends_with("mod ") || behind.starts_with("::") && !before.ends_with("::")
    });
    let by_option = places(option).iter().any(|(before, behind)| {
        let first = before.trim().trim_start_matches("pub").trim().is_empty();
        before.ends_with('.') && !behind.starts_with('(') || first && behind.starts_with(": ")
    });
    by_module || by_option
}

/// The count of each device, and its lines, of files with their paths.
pub fn table(files: &[(&str, &str)]) -> String {
    let mut text = format!("\nlines that each virtio device costs outside its own files (at most {MOST}):\n");
    for (module, option, own) in DEVICES {
        let mut lines = Vec::new();
        for (path, content) in files {
            let apart = own.iter().chain(&APART).any(|start| path.starts_with(start));
            if path.starts_with("src/") && !apart && !path.contains("/tests") && !path.contains("fuzz") {
                let all = naming(content, module, option).into_iter();
                lines.extend(all.map(|(number, line)| format!("    {path}:{number}: {line}")));
            }
        }
        let over = if lines.len() > MOST { "  OVER" } else { "" };
        let _ = writeln!(text, "  {module}: {}{over}\n{}", lines.len(), lines.join("\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_names_a_device_counts_and_what_has_its_name_does_not() {
        for yes in
            ["pub mod net;", "net::Net::new(a)", "x(virtio::net::A)", "    pub net: Vec<Words>,", "a(config.net.len())"]
        {
            assert!(names(yes, "net", "net"), "{yes}");
        }
        for no in ["use std::os::unix::net::A;", "let net = 1;", "ethernet::x", "a.net()", "f(net: u8)", "nets: u8,"] {
            assert!(!names(no, "net", "net"), "{no}");
        }
        assert!(names("config.disk", "block", "disk") && !names("config.block", "block", "disk"));
    }

    #[test]
    fn tests_comments_and_strings_cost_nothing() {
        let text = "#[cfg(test)]\nmod tests;\n// mod rng;\nlet a = \"rng::x\";\nmod rng;\n#[cfg(test)]\nmod tests {\n    rng::x();\n}\n";
        assert_eq!(naming(text, "rng", "rng"), [(5, "mod rng;")]);
    }

    #[test]
    fn the_table_leaves_a_devices_own_files_out() {
        let files = [("src/virtio/rng.rs", "mod rng;"), ("src/a.rs", "mod rng;\nmod rng;"), ("tests/a.rs", "mod rng;")];
        let table = table(&files);
        assert!(table.contains("  rng: 2\n    src/a.rs:1: mod rng;\n") && table.contains("  net: 0\n"), "{table}");
        let many = "mod net;\n".repeat(11);
        assert!(super::table(&[("src/a.rs", many.as_str())]).contains("net: 11  OVER"));
    }
}
