//! Seconds since 1970 and the proleptic Gregorian calendar.

/// 9999-12-31 23:59:59.
pub(super) const MAX_SECS: i64 = 253_402_300_799;

const DAY: i64 = 86_400;
/// Days of 400 years.
const ERA: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH: i64 = 719_468;

/// A point in time as a calendar and a clock show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Civil {
    pub year: u16,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 is Sunday.
    pub weekday: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
}

impl Civil {
    /// From seconds since 1970, which must be in 0 to `MAX_SECS`.
    pub(super) fn from_secs(secs: i64) -> Self {
        let (days, rest) = (secs.div_euclid(DAY), secs.rem_euclid(DAY));
        // Years that begin in March put the leap day last.
        let z = days + EPOCH;
        let (era, of_era) = (z.div_euclid(ERA), z.rem_euclid(ERA));
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * of_year + 2) / 153;
        let month = (march_month + 2) % 12 + 1;
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        Civil {
            year: year as u16,
            month: month as u8,
            day: (of_year - (153 * march_month + 2) / 5 + 1) as u8,
            weekday: (days + 4).rem_euclid(7) as u8,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }

    /// To seconds since 1970; `None` for what no calendar shows.
    pub(super) fn to_secs(self) -> Option<i64> {
        if !(1970..=9999).contains(&self.year)
            || !(1..=12).contains(&self.month)
            || self.hour > 23
            || self.minute > 59
            || self.second > 59
        {
            return None;
        }
        let leap = self.year.is_multiple_of(4)
            && (!self.year.is_multiple_of(100) || self.year.is_multiple_of(400));
        let last = match self.month {
            2 if leap => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        if self.day == 0 || self.day > last {
            return None;
        }
        let (month, day) = (i64::from(self.month), i64::from(self.day));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
        let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
        let days = era * ERA + of_era - EPOCH;
        Some(
            days * DAY
                + i64::from(self.hour) * 3600
                + i64::from(self.minute) * 60
                + i64::from(self.second),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_day_of_the_range_round_trips() {
        let (mut year, mut month, mut day, mut weekday) = (1970u16, 1u8, 1u8, 4u8);
        let mut secs = 0;
        while secs <= MAX_SECS {
            let c = Civil::from_secs(secs + 86_399);
            assert_eq!(
                (c.year, c.month, c.day, c.weekday),
                (year, month, day, weekday)
            );
            assert_eq!((c.hour, c.minute, c.second), (23, 59, 59));
            assert_eq!(c.to_secs(), Some(secs + 86_399));
            secs += DAY;
            weekday = (weekday + 1) % 7;
            day += 1;
            if (Civil {
                year,
                month,
                day,
                weekday,
                hour: 0,
                minute: 0,
                second: 0,
            })
            .to_secs()
            .is_none()
            {
                day = 1;
                month += 1;
                if month > 12 {
                    month = 1;
                    year += 1;
                }
            }
        }
        assert_eq!(year, 10_000);
    }

    #[test]
    fn known_dates() {
        // date -u -d @1600000000
        let c = Civil::from_secs(1_600_000_000);
        assert_eq!(
            (c.year, c.month, c.day, c.hour, c.minute, c.second),
            (2020, 9, 13, 12, 26, 40)
        );
        assert_eq!(c.weekday, 0);
        let leap = Civil {
            year: 2000,
            month: 2,
            day: 29,
            weekday: 0,
            hour: 0,
            minute: 0,
            second: 0,
        };
        assert_eq!(leap.to_secs(), Some(951_782_400));
        assert_eq!(Civil { year: 2100, ..leap }.to_secs(), None);
        assert_eq!(Civil { month: 13, ..leap }.to_secs(), None);
    }
}
