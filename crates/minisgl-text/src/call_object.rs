//! A call's JSON object, read byte by byte while a model writes it.

use std::mem;

/// What a byte of the object was.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// One of many.
    Part,
    /// The first of the arguments, of a call of the function with this name.
    Begin(String),
    /// The last of the arguments.
    ArgumentsEnd,
    /// The last of the object.
    End,
    /// None that a call has here.
    Broken,
}

/// Follows `{"name": …, "arguments": {…}}` far enough to say where the arguments are. Other members
/// are passed over, and so is what only a parser of all JSON would find wrong: the arguments are the
/// client's to read, as the model wrote them.
#[derive(Clone, Debug)]
pub(crate) struct CallObject {
    place: Place,
    key: Key,
    value: Nesting,
    /// A key, or a value that is needed, as far as it has come.
    word: Vec<u8>,
    name: Option<String>,
    /// Arguments that came before the name.
    early: Option<Vec<u8>>,
    has_begun: bool,
    /// There are arguments, and no object around them.
    is_alone: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Before the brace that opens the object.
    Outside,
    /// Before a key, or the object's end.
    Member,
    InKey,
    Colon,
    /// Before a value.
    Value,
    InValue,
    /// Before a comma, or the object's end.
    Comma,
    /// Behind arguments that stand alone.
    Ended,
}

/// What a member is to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Name,
    Arguments,
    Other,
}

impl CallObject {
    /// An object that is still to come.
    pub(crate) fn new() -> Self {
        Self {
            place: Place::Outside,
            key: Key::Other,
            value: Nesting::default(),
            word: Vec::new(),
            name: None,
            early: None,
            has_begun: false,
            is_alone: false,
        }
    }

    /// Arguments alone, of a function whose name was told before.
    pub(crate) fn named(name: String) -> Self {
        let name = Some(name);
        Self { place: Place::Value, key: Key::Arguments, name, is_alone: true, ..Self::new() }
    }

    /// Whether the call is certain: its arguments have begun, and its name is known.
    pub(crate) fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Whether the last byte was one of the arguments, and more of them follow.
    pub(crate) fn is_in_arguments(&self) -> bool {
        self.has_begun && self.key == Key::Arguments && self.place == Place::InValue
    }

    /// Whether it was arguments alone, and they have come.
    pub(crate) fn has_ended(&self) -> bool {
        self.place == Place::Ended
    }

    /// Name and arguments of an object that has ended without [`Seen::Begin`], where it has both.
    pub(crate) fn whole(self) -> Option<(String, String)> {
        Some((self.name?, String::from_utf8(self.early?).ok()?))
    }

    /// Takes the next byte.
    pub(crate) fn step(&mut self, byte: u8) -> Seen {
        let is_space = byte.is_ascii_whitespace();
        let next = match (self.place, byte) {
            (Place::InKey, _) => return self.step_key(byte),
            (Place::InValue, _) => return self.step_value(byte),
            _ if is_space => return Seen::Part,
            (Place::Outside, b'{') | (Place::Comma, b',') => Place::Member,
            (Place::Member, b'"') => {
                self.word.clear();
                self.value = Nesting::default();
                self.step_key(byte);
                Place::InKey
            }
            (Place::Member | Place::Comma, b'}') => return Seen::End,
            (Place::Colon, b':') => Place::Value,
            (Place::Value, _) => return self.begin_value(byte),
            _ => return Seen::Broken,
        };
        self.place = next;
        Seen::Part
    }

    fn step_key(&mut self, byte: u8) -> Seen {
        self.word.push(byte);
        if self.value.step(byte) == Value::Ended {
            self.key = match self.word.as_slice() {
                br#""name""# => Key::Name,
                br#""arguments""# | br#""parameters""# => Key::Arguments,
                _ => Key::Other,
            };
            self.place = Place::Colon;
        }
        Seen::Part
    }

    fn begin_value(&mut self, byte: u8) -> Seen {
        let is_wrong = match self.key {
            // A second member of that name is one more of the others.
            _ if self.has_begun => {
                self.key = Key::Other;
                false
            }
            Key::Name => byte != b'"',
            Key::Arguments => byte != b'{',
            Key::Other => b",]}:".contains(&byte),
        };
        if is_wrong {
            return Seen::Broken;
        }
        self.place = Place::InValue;
        self.value = Nesting::default();
        self.word.clear();
        if self.key == Key::Arguments
            && let Some(name) = &self.name
        {
            self.has_begun = true;
            self.value.step(byte);
            return Seen::Begin(name.clone());
        }
        self.step_value(byte)
    }

    fn step_value(&mut self, byte: u8) -> Seen {
        let step = self.value.step(byte);
        if step == Value::EndedBefore {
            self.place = Place::Comma;
            return self.step(byte);
        }
        if self.key != Key::Other && !self.has_begun {
            self.word.push(byte);
        }
        if step == Value::Inside {
            return Seen::Part;
        }
        self.place = Place::Comma;
        match self.key {
            Key::Arguments if self.has_begun => {
                if self.is_alone {
                    self.place = Place::Ended;
                }
                return Seen::ArgumentsEnd;
            }
            Key::Arguments => self.early = Some(mem::take(&mut self.word)),
            Key::Name => match serde_json::from_slice::<String>(&self.word) {
                Ok(name) if !name.is_empty() => self.name = Some(name),
                _ => return Seen::Broken,
            },
            Key::Other => {}
        }
        Seen::Part
    }
}

/// How deep in a JSON value the next byte is.
#[derive(Clone, Debug, Default)]
struct Nesting {
    depth: usize,
    is_string: bool,
    is_escaped: bool,
}

/// What a byte is to a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    Inside,
    /// Its last byte.
    Ended,
    /// Numbers and words say nothing of their end: this byte is the first behind it.
    EndedBefore,
}

impl Nesting {
    fn step(&mut self, byte: u8) -> Value {
        if self.is_string {
            let ends = byte == b'"' && !self.is_escaped;
            self.is_escaped = byte == b'\\' && !self.is_escaped;
            self.is_string = !ends;
            return if ends && self.depth == 0 { Value::Ended } else { Value::Inside };
        }
        match byte {
            b'"' => self.is_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' if self.depth > 0 => {
                self.depth -= 1;
                return if self.depth == 0 { Value::Ended } else { Value::Inside };
            }
            _ if self.depth > 0 => {}
            b',' | b'}' | b']' => return Value::EndedBefore,
            _ if byte.is_ascii_whitespace() => return Value::EndedBefore,
            _ => {}
        }
        Value::Inside
    }
}
