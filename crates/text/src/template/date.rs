//! `strftime` for chat templates, which like to say today's date. Times are UTC.
//!
//! Days since 1970-01-01 become a date by counting in eras of 400 years that start in March, so that the leap day is
//! the last day of a year ("chrono-compatible low-level date algorithms", Howard Hinnant).

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Writes `seconds` since 1970 as `format` says; unknown directives stay as they are.
pub(crate) fn strftime(format: &str, seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let weekday = WEEKDAYS[(days + 4).rem_euclid(7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let hour12 = (hour + 11) % 12 + 1;

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        // `%-d` is `%d` without the zero in front.
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let two = |n: i64| if padded { format!("{n:02}") } else { n.to_string() };
        out.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year.rem_euclid(100)),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('e') => format!("{day:2}"),
            Some('H') => two(hour),
            Some('I') => two(hour12),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('j') => format!("{:03}", days - days_of(year) + 1),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{}{other}", if padded { "" } else { "-" }),
            None => "%".to_owned(),
        });
    }
    out
}

/// Year, month and day of a day since 1970.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468; // since 0000-03-01
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

/// The first day of `year`, in days since 1970.
fn days_of(year: i64) -> i64 {
    let before = year - 1;
    365 * (year - 1970) + (before.div_euclid(4) - before.div_euclid(100) + before.div_euclid(400)) - 477
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(format: &str, seconds: i64, expected: &str) {
        assert_eq!(strftime(format, seconds), expected);
    }

    #[test]
    fn dates() {
        check("%Y-%m-%d %H:%M:%S %a %j", 0, "1970-01-01 00:00:00 Thu 001");
        check("%d %B %Y, %A, %I %p", 951_825_600, "29 February 2000, Tuesday, 12 PM");
        check("%-d %b %y %e %j", 1_767_225_599, "31 Dec 25 31 365");
        check("%F %T %j", 1_735_689_599, "2024-12-31 23:59:59 366");
        check("%F", -1, "1969-12-31");
        check("100%% %q %", 0, "100% %q %");
    }
}
