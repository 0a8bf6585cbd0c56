use super::*;

// One TSC tick is one crystal tick.
const S: u64 = CRYSTAL;
/// 2020-09-13 12:26:40, a Sunday.
const T: i64 = 1_600_000_000;

fn rtc() -> Rtc {
    Rtc::new(&Clock::new(CRYSTAL), 0, T)
}

fn get(r: &mut Rtc, index: u8, now: u64) -> u8 {
    r.write(0x70, index, now);
    r.read(0x71, now)
}

fn put(r: &mut Rtc, index: u8, value: u8, now: u64) -> bool {
    r.write(0x70, index, now);
    r.write(0x71, value, now)
}

fn date(r: &mut Rtc, now: u64) -> [u8; 8] {
    [CENTURY, 9, 8, 7, 6, 4, 2, 0].map(|i| get(r, i, now))
}

#[test]
fn shows_the_time_in_every_format() {
    let mut r = rtc();
    assert_eq!(
        date(&mut r, 0),
        [0x20, 0x20, 0x09, 0x13, 0x01, 0x12, 0x26, 0x40]
    );
    assert_eq!(
        date(&mut r, 21 * S),
        [0x20, 0x20, 0x09, 0x13, 0x01, 0x12, 0x27, 0x01]
    );
    put(&mut r, REG_B, B_BINARY | B_24H, 0);
    assert_eq!(date(&mut r, 11 * 3600 * S), [20, 20, 9, 13, 1, 23, 26, 40]);
    put(&mut r, REG_B, 0, 0);
    assert_eq!(get(&mut r, HOURS, 0), 0x92, "12 PM");
    assert_eq!(get(&mut r, HOURS, 11 * 3600 * S), 0x91, "11 PM");
    assert_eq!(get(&mut r, HOURS, 12 * 3600 * S), 0x12, "12 AM");
    assert_eq!(r.read(0x70, 0), 0xff);
    assert_eq!(get(&mut r, REG_D, 0), 0x80);
}

#[test]
fn uip_announces_the_update() {
    let mut r = rtc();
    assert_eq!(get(&mut r, REG_A, S - 9), 0x26);
    assert_eq!(get(&mut r, REG_A, S - 8), 0xa6);
    assert_eq!(get(&mut r, SECONDS, S - 1), 0x40);
    assert_eq!(get(&mut r, REG_A, S), 0x26);
    assert_eq!(get(&mut r, SECONDS, S), 0x41);
}

#[test]
fn a_guest_sets_the_time_with_updates_stopped() {
    let mut r = rtc();
    put(&mut r, REG_B, B_SET | B_24H | B_UPDATE, 5 * S);
    assert_eq!(get(&mut r, REG_B, 5 * S), B_SET | B_24H);
    assert_eq!(get(&mut r, SECONDS, 50 * S), 0x45, "stands");
    assert_eq!(r.time(50 * S), None);
    assert_eq!(r.set_time(7, 50 * S), Err(RtcError::Busy));
    for (i, v) in [
        (CENTURY, 0x19),
        (9, 0x99),
        (8, 0x12),
        (7, 0x31),
        (4, 0x23),
        (2, 0x59),
        (0, 0x58),
    ] {
        put(&mut r, i, v, 60 * S);
    }
    put(&mut r, REG_B, B_24H, 60 * S);
    assert_eq!(r.time(60 * S), Some(946_684_798));
    assert_eq!(
        date(&mut r, 62 * S),
        [0x20, 0x00, 0x01, 0x01, 0x07, 0x00, 0x00, 0x00]
    );
    // Nonsense: the clock stands until it is mended.
    put(&mut r, REG_B, B_SET | B_24H, 70 * S);
    put(&mut r, 8, 0x13, 70 * S);
    put(&mut r, REG_B, B_24H, 70 * S);
    assert_eq!(r.time(80 * S), None);
    assert_eq!(get(&mut r, 8, 80 * S), 0x13);
    assert_eq!(r.set_time(T, 90 * S), Ok(()));
    assert_eq!(r.time(91 * S), Some(T + 1));
}

#[test]
fn a_guest_sets_one_byte_of_the_running_clock() {
    let mut r = rtc();
    put(&mut r, HOURS, 0x13, S / 2);
    assert_eq!(r.time(S), Some(T + 3601), "in its phase");
    put(&mut r, CENTURY, 0x21, S);
    assert_eq!(date(&mut r, S)[..2], [0x21, 0x20]);
    assert_eq!(r.next_deadline(), None);
}

#[test]
fn the_divider_freezes_time() {
    let mut r = rtc();
    put(&mut r, REG_A, 0x66, 3 * S);
    assert_eq!(r.time(30 * S), Some(T + 3));
    put(&mut r, REG_A, 0x26, 30 * S + 5);
    assert_eq!(r.time(31 * S + 4), Some(T + 3));
    assert_eq!(r.time(31 * S + 5), Some(T + 4));
}

#[test]
fn periodic_interrupts_once_per_look() {
    let mut r = rtc();
    put(&mut r, REG_A, 0x26, 0); // 1024 Hz
    assert!(!put(&mut r, REG_B, B_24H | B_PERIODIC, 0));
    assert_eq!(r.next_deadline().unwrap(), 33);
    assert!(!r.service(31));
    assert!(r.service(32));
    assert_eq!(r.next_deadline(), None);
    assert!(!r.service(96));
    assert_eq!(get(&mut r, REG_C, 97), 0xc0);
    assert_eq!(get(&mut r, REG_C, 98), 0);
    assert!(r.service(128));
    r.reset(200);
    assert_eq!(get(&mut r, REG_C, 200), 0);
    assert_eq!(get(&mut r, REG_B, 200), B_24H);
    for (rate, ticks) in [(1, 128), (2, 256), (3, 4), (15, 16384)] {
        let mut r = rtc();
        put(&mut r, REG_A, 0x20 | rate, 0);
        put(&mut r, REG_B, B_24H | B_PERIODIC, 0);
        assert!(!r.service(ticks - 1));
        assert!(r.service(ticks));
    }
}

#[test]
fn flags_are_seen_without_their_interrupts() {
    let mut r = rtc();
    put(&mut r, REG_A, 0x20, 0);
    assert_eq!(get(&mut r, REG_C, S - 1), 0);
    assert_eq!(get(&mut r, REG_C, S), B_UPDATE);
    assert!(!r.service(2 * S));
    assert!(
        put(&mut r, REG_B, B_24H | B_UPDATE, 2 * S),
        "enabling it with the flag up"
    );
}

#[test]
fn update_ended_interrupts_each_second() {
    let mut r = rtc();
    put(&mut r, REG_A, 0x20, 0);
    put(&mut r, REG_B, B_24H | B_UPDATE, 10);
    assert_eq!(r.next_deadline(), Some(S + 1));
    assert!(r.service(S));
    assert_eq!(get(&mut r, REG_C, S), 0x90);
    assert_eq!(r.next_deadline(), Some(2 * S + 1));
}

#[test]
fn alarms_with_and_without_wildcards() {
    let mut r = rtc();
    put(&mut r, REG_A, 0x20, 0);
    for (i, v) in [(5, 0x14), (3, 0x30), (1, 0x15)] {
        put(&mut r, i, v, 0);
    }
    put(&mut r, REG_B, B_24H | B_ALARM, 0);
    let at = (2 * 3600 + 3 * 60 + 35) * S; // 14:30:15
    assert_eq!(r.next_deadline(), Some(at + 1));
    assert!(!r.service(at - 1));
    assert!(r.service(at));
    assert_eq!(get(&mut r, REG_C, at), 0xb0);
    assert_eq!(r.next_deadline(), Some(at + 86_400 * S + 1), "the next day");
    put(&mut r, 5, 0xff, at);
    put(&mut r, 3, 0xc0, at);
    assert_eq!(r.next_deadline(), Some(at + 60 * S + 1), "each minute");
    // Late by more than a day: once.
    assert!(r.service(at + 100_000 * S));
    put(&mut r, 1, 0x77, at);
    get(&mut r, REG_C, at + 100_000 * S);
    assert_eq!(r.next_deadline(), None, "there is no such second");
}

#[test]
fn memory_belongs_to_whom_it_belongs() {
    let mut r = rtc();
    assert_eq!(r.poke(0x34, 0xab), Ok(()));
    assert_eq!(get(&mut r, 0x34, 0), 0xab);
    put(&mut r, 0x7f, 0x55, 0);
    assert_eq!(r.peek(0x7f, 0), Ok(0x55));
    assert_eq!(r.peek(0, 2 * S), Ok(0x42));
    assert_eq!(r.peek(128, 0), Err(RtcError::Offset));
    assert_eq!(r.peek(u32::MAX, 0), Err(RtcError::Offset));
    for clock in [0, 9, 10, 13, u32::from(CENTURY), 128, 0x1_0034] {
        assert_eq!(r.poke(clock, 0), Err(RtcError::Offset));
    }
    assert_eq!(r.set_time(-1, 0), Err(RtcError::Time));
    assert_eq!(r.set_time(MAX_SECS, 0), Ok(()));
    assert_eq!(date(&mut r, 5 * S)[..2], [0x99, 0x99]);
}
