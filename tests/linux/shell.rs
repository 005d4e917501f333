//! A Linux guest whose shell one types at.
#![allow(dead_code)]

use std::path::Path;

use crate::common;
use crate::guest::{Guest, Told, linux};

/// The kernel.
pub const KERNEL: &str = "6.12/vmlinuz";

pub struct Shell {
    pub guest: Guest,
    asked: u32,
}

impl Shell {
    /// A machine with these words and a kernel with these modules, in this order; none where no kernel can run.
    pub fn start(words: &str, modules: &str) -> Option<Self> {
        let mut guest = linux(KERNEL, words, "quiet bantam.checks=none bantam.do=shell")?;
        guest.until("# ");
        let mut shell = Self { guest, asked: 0 };
        shell.ask("stty -echo; dmesg -n 1; cd /lib/modules/$(uname -r)");
        for module in modules.split_whitespace() {
            shell.run(&format!("insmod {module}.ko"));
        }
        Some(shell)
    }

    /// One that waits at its shell in a snapshot of a machine.
    pub fn restore(folder: &Path, verify: &str) -> Self {
        Self { guest: Guest::restore(folder, verify), asked: 0 }
    }

    /// What a command prints.
    pub fn ask(&mut self, command: &str) -> String {
        self.ask_with(command, "")
    }

    /// What a command prints that reads what is typed once it runs.
    pub fn ask_with(&mut self, command: &str, typed: &str) -> String {
        self.asked += 1;
        let (start, end) = (format!("<<{}>>", self.asked), format!(">>{}<<", self.asked));
        // The shell shows the line, too, and so that is not where they are found.
        let say = |mark: &str| format!("echo {:?}\"\"{:?}", &mark[..1], &mark[1..]);
        self.guest.keys(&format!("{}; {command}; {}\n", say(&start), say(&end)));
        self.guest.until(&start);
        if !typed.is_empty() {
            std::thread::sleep(common::within(0.3));
            self.guest.keys(typed);
        }
        self.guest.until(&end);
        let text = self.guest.text();
        let (from, to) = (text.rfind(&start).unwrap() + start.len(), text.rfind(&end).unwrap());
        text[from..to].trim().to_owned()
    }

    /// Types a command and does not wait for it.
    pub fn begin(&mut self, command: &str) {
        self.guest.keys(&format!("{command}\n"));
    }

    /// Waits until the console shows this once more.
    pub fn until(&mut self, text: &str) {
        self.guest.until(text);
    }

    /// A command's end is a good one.
    #[track_caller]
    pub fn run(&mut self, command: &str) {
        let printed = self.ask(&format!("{command}; echo code $?"));
        assert!(printed.ends_with("code 0"), "{command}: {printed}");
    }

    /// The same, which is this.
    #[track_caller]
    pub fn is(&mut self, command: &str, result: &str) {
        assert_eq!(self.ask(command), result, "{command}");
    }

    /// The driver lets go of its device and takes it again, so many times.
    #[track_caller]
    pub fn rebind(&mut self, driver: &str, times: u32) {
        let folder = format!("/sys/bus/virtio/drivers/{driver}");
        let name = self.ask(&format!("cd {folder}; ls -d virtio*; cd - >/dev/null"));
        let once = format!("echo {name} >{folder}/unbind && echo {name} >{folder}/bind");
        self.run(&format!("for n in $(seq {times}); do {once} || break; done; [ -e {folder}/{name} ]"));
    }

    /// Ends the guest; its kernel has nothing to complain of.
    pub fn end(self) -> Told {
        self.end_by("poweroff -f\n")
    }

    pub fn end_by(mut self, keys: &str) -> Told {
        let complaints = self.ask("dmesg -r | grep '^<[0-4]>' | sed 's/^/check dmesg: /'");
        let told = self.leave(keys);
        assert!(told.complaints().is_empty(), "{complaints}");
        told
    }

    /// Ends the guest, whatever its kernel says.
    pub fn leave(mut self, keys: &str) -> Told {
        self.guest.keys(keys);
        let told = self.guest.end();
        told.expect(0);
        told
    }
}
