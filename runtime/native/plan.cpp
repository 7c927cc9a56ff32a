// The order in which a region computes, and where its values lie meanwhile.
#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>

#include "region.h"

namespace elsa {
namespace {

constexpr std::size_t kLine = kAlign / sizeof(float);

bool is_function(const Step& step, Function function) {
    return step.row && step.row->kind == RowOp::function && step.row->function == function;
}

// x * sigmoid(x) in one step, where nobody else reads the sigmoid.
void fuse_silu(std::vector<Step>& steps, const std::vector<std::string>& outputs) {
    std::map<std::string, std::size_t> readers, maker;
    for (const std::string& value : outputs) ++readers[value];
    for (std::size_t i = 0; i < steps.size(); ++i) {
        for (const std::string& value : steps[i].inputs) ++readers[value];
        for (const std::string& value : steps[i].outputs) maker[value] = i;
    }
    std::vector<bool> gone(steps.size(), false);
    for (Step& step : steps) {
        if (!step.row || step.row->kind != RowOp::times) continue;
        for (std::size_t i = 0; i < 2; ++i) {
            const std::string gate = step.inputs[i], x = step.inputs[1 - i];
            const auto made = maker.find(gate);
            if (made == maker.end() || readers[gate] != 1) continue;
            const Step& before = steps[made->second];
            if (!is_function(before, Function::sigmoid) || before.inputs[0] != x) continue;
            gone[made->second] = true;
            step.row->kind = RowOp::function;
            step.row->function = Function::silu;
            step.inputs = {x};
            break;
        }
    }
    std::vector<Step> kept;
    for (std::size_t i = 0; i < steps.size(); ++i) {
        if (!gone[i]) kept.push_back(std::move(steps[i]));
    }
    steps = std::move(kept);
}

class Planner {
  public:
    Planner(const std::vector<std::string>& inputs, const std::vector<std::string>& outputs) {
        for (std::size_t i = 0; i < outputs.size(); ++i) output_[outputs[i]] = static_cast<int>(i);
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            plan_.values[value(inputs[i])].input = static_cast<int>(i);
        }
    }

    Plan made(std::vector<Step> steps) {
        while (!steps.empty()) {
            const auto ready = [&](const Step& step) {
                return std::all_of(step.inputs.begin(), step.inputs.end(), [&](const auto& name) {
                    return number_.count(name) != 0;
                });
            };
            const auto next = std::find_if(steps.begin(), steps.end(), ready);
            if (next == steps.end()) throw std::logic_error("a region reads what nobody makes");
            append(std::move(*next));
            steps.erase(next);
        }
        for (const auto& [name, _] : output_) {
            if (number_.count(name) == 0) throw std::logic_error("a region without its output");
        }
        lay_out();
        return std::move(plan_);
    }

  private:
    std::size_t value(const std::string& name) {
        const auto [found, fresh] = number_.emplace(name, plan_.values.size());
        if (fresh) {
            plan_.values.emplace_back();
            const auto output = output_.find(name);
            if (output != output_.end()) plan_.values.back().output = output->second;
        }
        return found->second;
    }

    void append(Step step) {
        for (const std::string& name : step.inputs) {
            step.from.push_back(value(name));
            const std::size_t width =
                step.row ? step.row->width : step.members.front().weight.view.columns;
            std::size_t& known = plan_.values[step.from.back()].width;
            if (known != 0 && known != width) throw std::logic_error("a region of other widths");
            known = width;
        }
        for (std::size_t i = 0; i < step.outputs.size(); ++i) {
            step.to.push_back(value(step.outputs[i]));
            plan_.values[step.to.back()].width =
                step.row ? step.row->width : step.members[i].weight.view.rows;
        }
        plan_.steps.push_back(std::move(step));
    }

    // Values that only the region sees share memory where no step needs both.
    void lay_out() {
        std::vector<std::size_t> last(plan_.values.size(), 0);
        for (std::size_t i = 0; i < plan_.steps.size(); ++i) {
            for (const std::size_t v : plan_.steps[i].from) last[v] = i;
            for (const std::size_t v : plan_.steps[i].to) last[v] = std::max(last[v], i);
        }
        std::vector<std::pair<std::size_t, std::size_t>> free;  // offset, width
        for (std::size_t i = 0; i < plan_.steps.size(); ++i) {
            for (const std::size_t v : plan_.steps[i].to) {
                Slot& slot = plan_.values[v];
                if (slot.output < 0) slot.offset = place(round_up(slot.width, kLine), free);
            }
            for (std::size_t v = 0; v < plan_.values.size(); ++v) {
                const Slot& slot = plan_.values[v];
                if (slot.input >= 0 || slot.output >= 0 || last[v] != i) continue;
                free.emplace_back(slot.offset, round_up(slot.width, kLine));
            }
        }
    }

    std::size_t place(std::size_t width, std::vector<std::pair<std::size_t, std::size_t>>& free) {
        for (auto& [offset, room] : free) {
            if (room < width) continue;
            const std::size_t at = offset;
            offset += width;
            room -= width;
            return at;
        }
        plan_.floats += width;
        return plan_.floats - width;
    }

    Plan plan_;
    std::map<std::string, int> output_;
    std::map<std::string, std::size_t> number_;
};

}  // namespace

Plan make_plan(std::vector<Step> steps, const std::vector<std::string>& inputs,
               const std::vector<std::string>& outputs) {
    fuse_silu(steps, outputs);
    return Planner(inputs, outputs).made(std::move(steps));
}

}  // namespace elsa
