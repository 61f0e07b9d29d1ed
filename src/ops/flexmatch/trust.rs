//! Whether counts of the labels can still be trusted.

/// What is known about aliases of the labels: the holder of one may write in ways that leave no trace.
#[derive(Default)]
pub struct Trust {
    /// An alias was alive when the labels were counted, or since.
    exposed: bool,
    /// One was alive at the last look.
    shared: bool,
    /// The labels were counted since the last look: once for each look is enough.
    counted: bool,
}

impl Trust {
    /// For labels of which there has been no alias yet.
    pub fn unshared() -> Self {
        Self::default()
    }

    /// For labels that have no alias, and that have not been counted yet.
    pub fn uncounted() -> Self {
        Self {
            exposed: true,
            ..Self::default()
        }
    }

    /// Records that an alias was handed out or adopted.
    pub fn shared_now(&mut self) {
        self.exposed = true;
        self.counted = false;
    }

    /// Records a look at whether an alias is alive.
    pub fn looked(&mut self, shared: bool) {
        self.shared = shared;
        self.exposed |= shared;
        self.counted = false;
    }

    /// Records that all labels were counted.
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
