//! What this host offers: `doctor [--json]`.

use twinstep_host::{doctor, packages::Store};

fn main() {
    let report = doctor::examine(Store::default_folder());
    if std::env::args().any(|argument| argument == "--json") {
        println!("{}", report.in_json());
    } else {
        print!("{}", report.in_words());
    }
}
