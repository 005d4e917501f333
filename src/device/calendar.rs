//! The civil (proleptic Gregorian) calendar: days since 1970-01-01 to year, month, day, and back.
//!
//! Invariant: the two directions are inverses of each other for every day of the years 0 to 9999.

/// A day of the calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Date {
    /// 0..=9999.
    pub year: i64,
    /// 1..=12.
    pub month: u8,
    /// 1..=31.
    pub day: u8,
}

/// 0000-01-01 and 9999-12-31, in days since 1970-01-01.
pub(super) const FIRST: i64 = -719_528;
pub(super) const LAST: i64 = 2_932_896;

/// Every fourth year is a leap year, but of the centuries only every fourth.
fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

/// Days before month 1..=12 of a year; month 13 gives the length of the year.
fn days_before_month(year: i64, month: u8) -> i64 {
    const BEFORE: [i64; 13] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334, 365];
    let plain = BEFORE.get(usize::from(month.saturating_sub(1))).copied().unwrap_or(365);
    plain + i64::from(month > 2 && is_leap(year))
}

/// Days from 1970-01-01 to the first of January of a year from 0 on: 365 for each year, and one for each leap year
/// among them, year 0 included.
fn days_before_year(year: i64) -> i64 {
    let past = year - 1;
    let leaps = past.div_euclid(4) - past.div_euclid(100) + past.div_euclid(400) + 1;
    FIRST + year * 365 + leaps
}

/// The number of a day; none where the calendar does not have it.
pub(super) fn days_of(date: Date) -> Option<i64> {
    let Date { year, month, day } = date;
    if !(0..=9999).contains(&year) || !(1..=12).contains(&month) || day == 0 {
        return None;
    }
    let start = days_before_month(year, month);
    let length = days_before_month(year, month + 1) - start;
    (i64::from(day) <= length).then(|| days_before_year(year) + start + i64::from(day) - 1)
}

/// The day of a number; a number outside the years 0 to 9999 gives the nearest day inside.
pub(super) fn date_of(days: i64) -> Date {
    let days = days.clamp(FIRST, LAST);
    // 400 years have 146097 days; the quotient is the year or, near its ends, a neighbour.
    let guess = (days - FIRST) * 400 / 146_097;
    let year = [guess + 1, guess, guess - 1].into_iter().find(|y| days_before_year(*y) <= days).unwrap_or(0);
    let rest = days - days_before_year(year);
    let month = (1..=12).rev().find(|m| days_before_month(year, *m) <= rest).unwrap_or(1);
    let day = u8::try_from(rest - days_before_month(year, month) + 1).unwrap_or(31);
    Date { year, month, day }
}

/// The day of the week, Sunday being 1 as in the MC146818 (1970-01-01 was a Thursday).
pub(super) fn weekday_of(days: i64) -> u8 {
    u8::try_from((days + 4).rem_euclid(7) + 1).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn date(year: i64, month: u8, day: u8) -> Date {
        Date { year, month, day }
    }

    #[test]
    fn known_days_have_their_numbers_both_ways() {
        for (day, number, weekday) in [
            (date(1970, 1, 1), 0, 5),
            (date(1969, 12, 31), -1, 4),
            (date(1972, 2, 29), 789, 3),
            (date(1999, 12, 31), 10956, 6),
            (date(2000, 2, 28), 11015, 2),
            (date(2000, 2, 29), 11016, 3),
            (date(2000, 3, 1), 11017, 4),
            (date(2024, 2, 29), 19782, 5),
            (date(2038, 1, 19), 24855, 3),
            (date(2100, 2, 28), 47540, 1),
            (date(2100, 3, 1), 47541, 2),
            (date(0, 1, 1), FIRST, 7),
            (date(9999, 12, 31), LAST, 6),
        ] {
            assert_eq!(days_of(day), Some(number), "{day:?}");
            assert_eq!(date_of(number), day, "{number}");
            assert_eq!(weekday_of(number), weekday, "{day:?}");
        }
    }

    #[test]
    fn days_that_do_not_exist_have_no_number() {
        for day in [
            date(2100, 2, 29),
            date(1900, 2, 29),
            date(2023, 2, 29),
            date(2024, 2, 30),
            date(2024, 4, 31),
            date(2024, 1, 32),
            date(2024, 1, 0),
            date(2024, 0, 1),
            date(2024, 13, 1),
            date(-1, 1, 1),
            date(10000, 1, 1),
            date(2024, 255, 255),
        ] {
            assert_eq!(days_of(day), None, "{day:?}");
        }
    }

    #[test]
    fn each_day_follows_the_one_before_it() {
        let mut before = date_of(FIRST);
        for number in FIRST + 1..=LAST {
            let day = date_of(number);
            let next_day = day.year == before.year && day.month == before.month && day.day == before.day + 1;
            let next_month = day.year == before.year && day.month == before.month + 1 && day.day == 1;
            let next_year = (day.year, day.month, day.day) == (before.year + 1, 1, 1);
            assert!(
                next_day || (next_month || (next_year && before.month == 12)) && before.day >= 28,
                "{before:?} {day:?}"
            );
            assert_eq!(days_of(day), Some(number));
            before = day;
        }
    }

    proptest::proptest! {
        #[test]
        fn any_number_gives_a_day_that_exists(number: i64) {
            let day = date_of(number);
            proptest::prop_assert_eq!(days_of(day), Some(number.clamp(FIRST, LAST)));
        }

        #[test]
        fn any_three_numbers_are_a_day_or_none(year: i64, month: u8, day: u8) {
            let date = Date { year, month, day };
            proptest::prop_assert!(days_of(date).is_none_or(|n| date_of(n) == date));
        }
    }
}
