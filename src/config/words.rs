//! Options with options of their own: `VALUE,key=value,flag`, as for a disk.
//!
//! Invariant: a [`Words`] is only text; who takes it apart says which words there are, and refuses all others.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Refusal, usage};

/// Such a text. A comma within a word is written twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Words(String);

impl FromStr for Words {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.into()))
    }
}

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The words of one option, taken out one by one.
pub struct Taken {
    /// The option and its text, for errors.
    whole: String,
    first: String,
    rest: Vec<(String, Option<String>)>,
}

/// A word as `key=value`, or a flag.
fn pair(word: String) -> (String, Option<String>) {
    match word.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (word, None),
    }
}

impl Words {
    /// The first word, and what is behind it: nothing, or a comma and more.
    pub fn split(&self) -> (String, &str) {
        let (mut first, mut letters) = (String::new(), self.0.char_indices().peekable());
        while let Some((at, letter)) = letters.next() {
            if letter == ',' && letters.next_if(|(_, next)| *next == ',').is_none() {
                return (first, self.0.get(at..).unwrap_or_default());
            }
            first.push(letter);
        }
        (first, "")
    }

    /// Such a text of a first word, and what [`Words::split`] gave.
    pub fn join(first: &str, rest: &str) -> Self {
        Self(first.replace(',', ",,") + rest)
    }

    /// The same with one word more.
    #[must_use]
    pub fn and(&self, word: &str) -> Self {
        Self(format!("{},{}", self.0, word.replace(',', ",,")))
    }

    /// Takes the text apart; `option` is what it was given to.
    pub fn take(&self, option: &str) -> Taken {
        let mut words = vec![String::new()];
        let mut letters = self.0.chars().peekable();
        while let Some(letter) = letters.next() {
            match letter {
                ',' if letters.next_if_eq(&',').is_none() => words.push(String::new()),
                other => words.last_mut().into_iter().for_each(|word| word.push(other)),
            }
        }
        let mut words = words.into_iter();
        let first = words.next().unwrap_or_default();
        Taken { whole: format!("{option} {}", self.0), first, rest: words.map(pair).collect() }
    }
}

impl Taken {
    /// The first word, whole.
    pub fn first(&self) -> &str {
        &self.first
    }

    /// An error about these words.
    pub fn refuse(&self, why: impl fmt::Display) -> Refusal {
        usage(format!("{}: {why}", self.whole))
    }

    /// The first word as one more `key=value` or flag, for options that have no word that stands alone.
    #[must_use]
    pub fn without_first(mut self) -> Self {
        let first = std::mem::take(&mut self.first);
        if !first.is_empty() {
            self.rest.insert(0, pair(first));
        }
        self
    }

    fn find(&mut self, key: &str) -> Result<Option<Option<String>>, Refusal> {
        let mut found = None;
        while let Some(at) = self.rest.iter().position(|(name, _)| name == key) {
            if found.is_some() {
                return Err(self.refuse(format_args!("{key} is said twice")));
            }
            found = Some(self.rest.remove(at).1);
        }
        Ok(found)
    }

    /// The value of `key=`, read as a `T`.
    ///
    /// # Errors
    /// It is said twice, without a value, or with one that is none.
    pub fn value<T: FromStr<Err: fmt::Display>>(&mut self, key: &str) -> Result<Option<T>, Refusal> {
        let Some(text) = self.find(key)? else { return Ok(None) };
        let Some(text) = text else { return Err(self.refuse(format_args!("{key} wants a value: {key}=…"))) };
        text.parse().map(Some).map_err(|e| self.refuse(format_args!("{key}={text}: {e}")))
    }

    /// The value of `key=`, one of these.
    ///
    /// # Errors
    /// It is said twice, without a value, or with another one.
    pub fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)]) -> Result<Option<T>, Refusal> {
        let Some(text) = self.value::<String>(key)? else { return Ok(None) };
        let found = choices.iter().find(|(name, _)| *name == text);
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        let refusal = || self.refuse(format_args!("{key}={text}: it is one of {}", names.join(", ")));
        found.map(|(_, choice)| Some(*choice)).ok_or_else(refusal)
    }

    /// Whether `flag` is said.
    ///
    /// # Errors
    /// It is said twice, or with a value.
    pub fn flag(&mut self, flag: &str) -> Result<bool, Refusal> {
        match self.find(flag)? {
            Some(Some(_)) => Err(self.refuse(format_args!("{flag} takes no value"))),
            found => Ok(found.is_some()),
        }
    }

    /// All words have been taken.
    ///
    /// # Errors
    /// One is left: nobody knows it.
    pub fn end(self) -> Result<(), Refusal> {
        match self.rest.first() {
            Some((word, _)) => Err(self.refuse(format_args!("there is no option {word:?}"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(text: &str) -> Taken {
        text.parse::<Words>().unwrap().take("--disk")
    }

    #[test]
    fn words_are_taken_out_one_by_one() {
        let mut words = taken("a,,b.img,ro,queues=4,cache=none");
        assert_eq!(words.first(), "a,b.img");
        assert_eq!(words.value::<u16>("queues").unwrap(), Some(4));
        assert_eq!(words.choice("cache", &[("none", 1), ("writeback", 2)]).unwrap(), Some(1));
        assert!(words.flag("ro").unwrap() && !words.flag("ro").unwrap());
        assert_eq!(words.value::<u16>("serial").unwrap(), None);
        words.end().unwrap();
    }

    #[test]
    fn the_first_word_can_be_another() {
        for (text, first, rest) in
            [("a,,b,ro,x=1,,2", "a,b", ",ro,x=1,,2"), ("a", "a", ""), (",,", ",", ""), ("", "", "")]
        {
            let words: Words = text.parse().unwrap();
            assert_eq!(words.split(), (first.to_owned(), rest));
            assert_eq!(Words::join(first, rest), words);
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let says = |refusal: Refusal, text: &str| {
            let said = refusal.to_string();
            assert!(refusal.status == 2 && said.contains(text) && said.contains("--disk"), "{said}");
        };
        says(taken("x,qeues=4").end().unwrap_err(), "qeues");
        says(taken("x,a=1,a=2").value::<u8>("a").unwrap_err(), "twice");
        says(taken("x,a").value::<u8>("a").unwrap_err(), "wants a value");
        says(taken("x,a=300").value::<u8>("a").unwrap_err(), "a=300");
        says(taken("x,ro=1").flag("ro").unwrap_err(), "takes no value");
        says(taken("foo").without_first().end().unwrap_err(), "foo");
        says(taken("x,f=vmdk").choice("f", &[("raw", ())]).unwrap_err(), "one of raw");
    }
}
