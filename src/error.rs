//! What Bantam says when it refuses: one line of what and why, at most one line of hint, and an exit status.
//!
//! Invariant: every error that reaches `main` becomes `bantam: what: why`, and its status is the one of the innermost
//! [`Refusal`] in its chain, or 125 where there is none.

/// Exit statuses of the command (`bantam --help` lists them; scripts depend on them).
pub mod status {
    /// The words on the command line, or in the configuration file, are wrong.
    pub const USAGE: u8 = 2;
    /// A bug in Bantam.
    pub const BUG: u8 = 101;
    /// `--timeout` or `--max-exits` was reached.
    pub const LIMIT: u8 = 124;
    /// Bantam could not build or run the machine.
    pub const HOST: u8 = 125;
    /// The guest died.
    pub const DIED: u8 = 126;
}

/// An error that knows its exit status and may carry a hint.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Refusal {
    what: String,
    /// The exit status of the process.
    pub status: u8,
    /// What to do about it, where there is something to do.
    pub hint: Option<String>,
}

impl Refusal {
    /// The same refusal with a line of advice.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// The user's words are wrong: status 2.
pub fn usage(what: impl Into<String>) -> Refusal {
    Refusal { what: what.into(), status: status::USAGE, hint: None }
}

/// The machine cannot be built or run: status 125.
pub fn refuse(what: impl Into<String>) -> Refusal {
    Refusal { what: what.into(), status: status::HOST, hint: None }
}

/// The guest cannot go on: status 126.
pub fn lost(what: impl Into<String>) -> Refusal {
    Refusal { what: what.into(), status: status::DIED, hint: None }
}

/// The exit status and the hint of an error chain.
pub fn verdict(error: &anyhow::Error) -> (u8, Option<&str>) {
    let refusal = error.chain().find_map(|cause| cause.downcast_ref::<Refusal>());
    refusal.map_or((status::HOST, None), |r| (r.status, r.hint.as_deref()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_refusal_keeps_its_status_under_context() {
        let error = Err::<(), _>(usage("bad word").hint("try another")).context("reading words").unwrap_err();
        assert_eq!(verdict(&error), (2, Some("try another")));
        assert_eq!(format!("{error:#}"), "reading words: bad word");
    }

    #[test]
    fn any_other_error_is_the_hosts() {
        assert_eq!(verdict(&anyhow::anyhow!("no")), (125, None));
    }
}
