//! Machines that run while others are measured, and where they lie.
//!
//! Invariant: nothing is measured before what it needs is there, and nothing goes on once it is ended.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::sh;

/// How long a machine, or a thousand, may take to be there.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(10);

/// Where everything lies; control sockets too, so that no other machine is in the way.
pub struct Place {
    /// A folder of the bench's own.
    pub folder: PathBuf,
    /// How often each side runs.
    pub runs: u32,
}

/// A machine, or clones, that run meanwhile.
pub struct Live(pub Child);

impl Live {
    /// Ends it, and waits for that.
    pub fn end(mut self) -> Result<()> {
        // The process has not been waited for, so the number is still its.
        signal(self.0.id(), libc::SIGTERM);
        self.0.wait().map(drop).context("waiting for machines to end")
    }
}

impl Drop for Live {
    /// None is left of a measurement that fails.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Place {
    /// Builds the programs.
    pub fn new(runs: u32) -> Result<Self> {
        let programs = ["build", "--quiet", "--release", "-p", "xtask", "--features", "inside", "--bin", "clone"];
        sh::run(sh::cargo(&programs))?;
        sh::run(sh::cargo(&["build", "--quiet", "--release", "-p", "bantam", "--bin", "bantam"]))?;
        let folder = sh::target().join("bench").join("clone");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(Self { folder, runs })
    }

    /// A program that was built here.
    pub fn program(&self, name: &str) -> Command {
        let mut command = Command::new(sh::target().join("release").join(name));
        command.env("XDG_RUNTIME_DIR", &self.folder).current_dir(&self.folder).stdin(Stdio::null());
        command
    }

    /// `bantam`, with words that have no space in them.
    pub fn bantam(&self, words: &str) -> Command {
        let mut command = self.program("bantam");
        command.args(words.split(' ')).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// What `bantam` says, which has nothing to complain of.
    pub fn tell(&self, words: &str) -> Result<String> {
        let mut command = self.bantam(words);
        sh::output({
            command.stdout(Stdio::piped());
            command
        })
    }

    /// Starts a machine, and waits until its guest has printed something.
    pub fn start(&self, name: &str, code: &[u8], words: &str) -> Result<Live> {
        fs::write(self.folder.join(format!("{name}.bin")), code)?;
        self.begin(name, &format!("run {name}.bin {words}"))
    }

    /// The same for one that goes on where its snapshot was written.
    pub fn restored(&self, name: &str) -> Result<Live> {
        self.begin(name, &format!("restore {name}.snapshot"))
    }

    fn begin(&self, name: &str, words: &str) -> Result<Live> {
        let words = format!("{words} --name {name} --serial file:{name}.out");
        let out = self.folder.join(format!("{name}.out"));
        // What one of that name has printed before.
        let _ = fs::remove_file(&out);
        let machine = Live(self.bantam(&words).spawn()?);
        wait_for(&words, || fs::metadata(&out).is_ok_and(|out| out.len() > 0))?;
        Ok(machine)
    }

    /// A snapshot that was restored once, so that its sums are compared.
    pub fn snapshot(&self, name: &str, code: &[u8], words: &str) -> Result<()> {
        let machine = self.start(name, code, words)?;
        self.tell(&format!("snapshot {name} {name}.snapshot"))?;
        machine.end()?;
        // One that was written a moment ago is not remembered.
        std::thread::sleep(Duration::from_millis(200));
        let once = self.bantam(&format!("restore {name}.snapshot --serial none --timeout 1")).status()?;
        ensure!(once.code() == Some(124), "{name}.snapshot: {once}");
        Ok(())
    }

    /// So many clones that live until they are ended, and stand still.
    pub fn kept(&self, of: &str, count: usize) -> Result<Option<Kept>> {
        if count == 0 {
            return Ok(None);
        }
        let out = self.folder.join("kept");
        let mut command = self.program("clone");
        command
            .args(["keep", &format!("{of}.snapshot"), &count.to_string()])
            .stdout(fs::File::create(&out)?)
            .stderr(Stdio::null());
        let parent = command.spawn()?;
        wait_for("clone keep", || fs::metadata(&out).is_ok_and(|out| out.len() >= count as u64))?;
        let children = children(parent.id());
        Ok(Some(Kept { parent, children }))
    }
}

/// Clones that stand still; one is the process itself.
pub struct Kept {
    parent: Child,
    children: Vec<u32>,
}

impl Kept {
    /// Ends it, and waits for that.
    pub fn end(mut self) -> Result<()> {
        // A clone that is not served hears no other signal; its parent waits for it.
        self.children.iter().for_each(|child| signal(*child, libc::SIGKILL));
        if self.children.is_empty() {
            self.parent.kill()?;
        }
        self.parent.wait().map(drop).context("waiting for clones to end")
    }
}

fn signal(process: u32, number: i32) {
    // SAFETY: a plain call; those who call it know the process to be theirs.
    #[allow(unsafe_code)]
    unsafe {
        libc::kill(process.cast_signed(), number)
    };
}

/// Waits until it is so.
pub fn wait_for(what: &str, is_there: impl Fn() -> bool) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while !is_there() {
        ensure!(Instant::now() < until, "{what}: nothing has come of it");
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// The processes that a process has started.
pub fn children(of: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|id| id.parse().ok()).collect()
}
