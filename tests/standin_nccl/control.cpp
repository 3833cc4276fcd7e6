// Records of calls, violations and faults, and the functions by which a test reads and sets them.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <vector>

#include "standin.hpp"

namespace standin {
namespace {

constexpr size_t kMostCalls = 200000;

struct Rule {
  std::string function;
  int rank = -1;  // any
  Fault fault;
  int after = 0;
  int times = -1;  // for ever
};

struct Control {
  std::mutex mutex;
  std::vector<std::string> calls;
  std::vector<std::string> violations;
  std::vector<Rule> rules;
  unsigned released = 0;
  int hanging = 0;
  std::string answer;
};

std::string quoted(const std::string& s) {
  std::string out = "\"";
  for (const char c : s) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + '"';
}

std::string joined(const std::vector<std::string>& items, bool quote) {
  std::string out = "[";
  for (const std::string& item : items) {
    if (out.size() > 1) out += ", ";
    out += quote ? quoted(item) : item;
  }
  return out + "]";
}

Fault parse_fault(const std::string& what) {
  const size_t colon = what.find(':');
  const std::string name = what.substr(0, colon);
  const bool given = colon != std::string::npos;
  const int value = given ? std::stoi(what.substr(colon + 1)) : -1;
  if (name == "in_progress") return {FaultKind::in_progress, value};
  if (name == "hang") return {FaultKind::hang, 0};
  if (name == "stall") return {FaultKind::stall, 0};
  if (name == "async" && given) return {FaultKind::async, value};
  if (name == "lose" && given) return {FaultKind::lose, value};
  return {FaultKind::result, std::stoi(what)};
}

// FUNCTION[/RANK]=WHAT[@AFTER][xTIMES]
Rule parse_rule(std::string rule) {
  Rule r;
  const size_t equals = rule.find('=');
  if (equals == std::string::npos) throw std::invalid_argument(rule);
  r.function = rule.substr(0, equals);
  std::string what = rule.substr(equals + 1);
  const size_t slash = r.function.find('/');
  if (slash != std::string::npos) {
    r.rank = std::stoi(r.function.substr(slash + 1));
    r.function.resize(slash);
  }
  const size_t times = what.rfind('x');
  if (times != std::string::npos) {
    r.times = std::stoi(what.substr(times + 1));
    what.resize(times);
  }
  const size_t after = what.find('@');
  if (after != std::string::npos) {
    r.after = std::stoi(what.substr(after + 1));
    what.resize(after);
  }
  r.fault = parse_fault(what);
  return r;
}

bool add_rules(Control& c, const char* rules) {
  std::stringstream all(rules);
  std::vector<Rule> parsed;
  for (std::string one; std::getline(all, one, ';');) {
    if (one.empty()) continue;
    try {
      parsed.push_back(parse_rule(one));
    } catch (const std::exception&) {
      std::fprintf(stderr, "standin: no such fault: %s\n", one.c_str());
      return false;
    }
  }
  c.rules.insert(c.rules.end(), parsed.begin(), parsed.end());
  return true;
}

Control& control() {
  static Control& c = *[] {
    auto* made = new Control;  // never destroyed: stream threads outlive static objects
    const char* rules = std::getenv("STANDIN_FAULTS");
    if (rules != nullptr && !add_rules(*made, rules)) std::abort();
    return made;
  }();
  return c;
}

}  // namespace

std::string text(const char* format, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}

bool option(const char* variable) { return number(variable, 0) != 0; }

int number(const char* variable, int otherwise) {
  const char* value = std::getenv(variable);
  return value == nullptr || *value == '\0' ? otherwise : std::atoi(value);
}

Record::Record(const char* function) : json_("{\"function\": " + quoted(function)) {}

Record::~Record() {
  Control& c = control();
  const std::lock_guard<std::mutex> lock(c.mutex);
  if (c.calls.size() < kMostCalls) c.calls.push_back(json_ + "}");
}

Record& Record::add(const char* key, const std::string& value) {
  json_ += ", " + quoted(key) + ": " + quoted(value);
  return *this;
}

Record& Record::add(const char* key, int64_t value) {
  json_ += ", " + quoted(key) + ": " + std::to_string(value);
  return *this;
}

Record& Record::add(const char* key, const void* value) {
  return add(key, static_cast<int64_t>(reinterpret_cast<intptr_t>(value)));
}

void violation(const std::string& what) {
  std::fprintf(stderr, "standin: violation: %s\n", what.c_str());
  Control& c = control();
  const std::lock_guard<std::mutex> lock(c.mutex);
  c.violations.push_back(what);
}

Fault next_fault(const char* function, int rank) {
  Control& c = control();
  const std::lock_guard<std::mutex> lock(c.mutex);
  Fault found;
  for (Rule& r : c.rules) {
    if (r.function != function || (r.rank >= 0 && r.rank != rank)) continue;
    if (r.after > 0) {
      --r.after;
    } else if (r.times != 0 && found.kind == FaultKind::none) {
      if (r.times > 0) --r.times;
      found = r.fault;
    }
  }
  return found;
}

void hang(const std::function<bool()>& stop) {
  Control& c = control();
  std::unique_lock<std::mutex> lock(c.mutex);
  ++c.hanging;
  const unsigned before = c.released;
  for (int turn = 0; c.released == before; ++turn) {
    lock.unlock();
    const bool stopped = stop();
    if (!stopped) pause(turn);
    lock.lock();
    if (stopped) break;
  }
  --c.hanging;
}

void pause(int turn) {
  if (turn < 200) {
    std::this_thread::yield();
  } else {
    std::this_thread::sleep_for(std::chrono::microseconds(turn < 2000 ? 50 : 500));
  }
}

int plain_fault(const char* function, int on_hang) {
  const Fault fault = next_fault(function, -1);
  switch (fault.kind) {
    case FaultKind::result:
      return fault.value;
    case FaultKind::hang:
      hang([] { return false; });
      return on_hang;
    case FaultKind::none:
    case FaultKind::in_progress:
    case FaultKind::async:
    case FaultKind::lose:
    case FaultKind::stall:
      return 0;
  }
  return 0;
}

}  // namespace standin

// Adds faults, "FUNCTION[/RANK]=WHAT[@AFTER][xTIMES]" separated by semicolons, where WHAT is a
// result code, in_progress[:POLLS], hang, async:CODE, lose:RANK or stall. 0, or 1 on bad text.
STANDIN_EXPORT int standin_fault(const char* rules) {
  auto& c = standin::control();
  const std::lock_guard<std::mutex> lock(c.mutex);
  return standin::add_rules(c, rules) ? 0 : 1;
}

// Lets every call that hangs go on.
STANDIN_EXPORT void standin_release() {
  auto& c = standin::control();
  const std::lock_guard<std::mutex> lock(c.mutex);
  ++c.released;
}

// How many calls hang now.
STANDIN_EXPORT int standin_hanging() {
  auto& c = standin::control();
  const std::lock_guard<std::mutex> lock(c.mutex);
  return c.hanging;
}

// Forgets faults, records and violations.
STANDIN_EXPORT void standin_clear() {
  auto& c = standin::control();
  const std::lock_guard<std::mutex> lock(c.mutex);
  c.rules.clear();
  c.calls.clear();
  c.violations.clear();
}

// The text stays until the next of these two calls.
STANDIN_EXPORT const char* standin_calls() {
  auto& c = standin::control();
  const std::lock_guard<std::mutex> lock(c.mutex);
  c.answer = standin::joined(c.calls, false);
  return c.answer.c_str();
}

STANDIN_EXPORT const char* standin_violations() {
  auto& c = standin::control();
  const std::lock_guard<std::mutex> lock(c.mutex);
  c.answer = standin::joined(c.violations, true);
  return c.answer.c_str();
}
