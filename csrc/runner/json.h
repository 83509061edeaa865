// Enough JSON to read exits.json and the header of a safetensors file, both a stranger's: depth, numbers and text are checked, every
// error names the byte. Names may stand once in an object.
#pragma once
#include <charconv>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fastee::runner {

struct Json {
  enum Kind { kNull, kBool, kNumber, kText, kList, kObject } kind = kNull;
  double number = 0;  // of kBool: 0 or 1
  std::string text;
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;

  bool null() const { return kind == kNull; }

  const Json& as(Kind wanted, const char* what) const {
    if (kind != wanted) throw std::runtime_error(std::string(what) + " has another type than expected");
    return *this;
  }

  const Json* find(std::string_view name) const {
    for (const auto& [key, value] : members)
      if (key == name) return &value;
    return nullptr;
  }

  const Json& at(const char* name) const {
    const Json* found = find(name);
    if (!found) throw std::runtime_error(std::string(name) + " is missing");
    return *found;
  }

  const std::string& string_at(const char* name) const { return at(name).as(kText, name).text; }
  double number_at(const char* name) const { return at(name).as(kNumber, name).number; }
  const std::vector<Json>& list_at(const char* name) const { return at(name).as(kList, name).items; }
};

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json read() {
    Json value = any(0);
    space();
    if (at_ != text_.size()) fail("expected the end");
    return value;
  }

 private:
  static constexpr int kDepth = 16;

  [[noreturn]] void fail(const char* what) const { throw std::runtime_error("malformed JSON at byte " + std::to_string(at_) + ": " + what); }
  void space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }
  bool take(char c) {
    space();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  bool word(std::string_view w) {
    if (text_.substr(at_, w.size()) != w) return false;
    at_ += w.size();
    return true;
  }

  Json any(int depth) {
    if (depth > kDepth) fail("nested too deep");
    space();
    Json v;
    if (take('{')) {
      v.kind = Json::kObject;
      if (take('}')) return v;
      do {
        std::string name = string();
        if (v.find(name)) fail("a name stands twice");
        if (!take(':')) fail("expected ':'");
        v.members.emplace_back(std::move(name), any(depth + 1));
      } while (take(','));
      if (!take('}')) fail("expected ',' or '}'");
    } else if (take('[')) {
      v.kind = Json::kList;
      if (take(']')) return v;
      do v.items.push_back(any(depth + 1));
      while (take(','));
      if (!take(']')) fail("expected ',' or ']'");
    } else if (at_ < text_.size() && text_[at_] == '"') {
      v.kind = Json::kText, v.text = string();
    } else if (word("true")) {
      v.kind = Json::kBool, v.number = 1;
    } else if (word("false")) {
      v.kind = Json::kBool;
    } else if (!word("null")) {
      const char *first = text_.data() + at_, *last = text_.data() + text_.size();
      const auto [end, error] = std::from_chars(first, last, v.number);
      if (error != std::errc() || !(*first == '-' || (*first >= '0' && *first <= '9'))) fail("expected a value");
      v.kind = Json::kNumber, at_ += end - first;
    }
    return v;
  }

  std::string string() {
    if (!take('"')) fail("expected text");
    std::string out;
    while (at_ < text_.size() && text_[at_] != '"') {
      const char c = text_[at_++];
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in text");
      if (c != '\\') {
        out += c;
        continue;
      }
      if (at_ >= text_.size()) break;
      const char e = text_[at_++];
      constexpr std::string_view from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
      if (const size_t i = from.find(e); i != std::string_view::npos) out += to[i];
      else if (e == 'u') out += unit();
      else fail("an unknown escape");
    }
    if (at_ >= text_.size()) fail("text without an end");
    ++at_;
    return out;
  }

  // \uXXXX as UTF-8. The writers escape control characters only, so a surrogate is refused rather than paired.
  std::string unit() {
    unsigned code = 0;
    const char* first = text_.data() + at_;
    if (text_.size() - at_ < 4 || std::from_chars(first, first + 4, code, 16).ptr != first + 4) fail("expected four hex digits");
    at_ += 4;
    if (code >= 0xD800 && code < 0xE000) fail("a surrogate");
    if (code < 0x80) return {static_cast<char>(code)};
    const char low = static_cast<char>(0x80 | (code & 0x3F));
    if (code < 0x800) return {static_cast<char>(0xC0 | code >> 6), low};
    return {static_cast<char>(0xE0 | code >> 12), static_cast<char>(0x80 | (code >> 6 & 0x3F)), low};
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace fastee::runner
