//! Whether counts of the labels are still true.

/// What is known of others who reach the labels: the holder of an alias may write in ways that leave no trace.
#[derive(Default)]
pub struct Trust {
    /// An alias was alive when the labels were counted, or since.
    exposed: bool,
    /// One was alive at the last look.
    shared: bool,
    /// They were counted since the last look: once for each is enough.
    counted: bool,
}

impl Trust {
    /// Of labels that nobody else has reached yet.
    pub fn unshared() -> Self {
        Self::default()
    }

    /// Of labels that nobody else reaches, and whose counts are not made yet.
    pub fn uncounted() -> Self {
        Self {
            exposed: true,
            ..Self::default()
        }
    }

    /// An alias was given away or taken in.
    pub fn shared_now(&mut self) {
        self.exposed = true;
        self.counted = false;
    }

    /// Somebody looked whether an alias is alive.
    pub fn looked(&mut self, shared: bool) {
        self.shared = shared;
        self.exposed |= shared;
        self.counted = false;
    }

    /// All labels were counted.
    pub fn counted(&mut self) {
        self.exposed = self.shared;
        self.counted = true;
    }

    /// Whether an alias was alive at the last look.
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Whether the counts may be wrong.
    pub fn is_lost(&self) -> bool {
        self.exposed && !self.counted
    }
}
